"""Data streams of a call: chunks in order, which are kept, so that a reader can start late or start again.

The writer of a bounded stream waits while more bytes than the bound are unread. A discarded stream keeps nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from modal_proto import api_pb2 as pb


class DataStream:
    """Numbered chunks. A chunk whose number was seen is dropped: the previous attempt has delivered it."""

    def __init__(self) -> None:
        self._chunks: list[pb.DataChunk] = []
        self._count = 0
        self._taken = 0  # number of chunks that a reader has processed
        self._unread_bytes = 0
        self._bound: int | None = None
        self._discards = False
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return self._count

    def put(self, chunk: pb.DataChunk) -> None:
        if not chunk.index:
            chunk.index = self._count + 1
        if chunk.index == self._count + 1:
            self._count += 1
            if not self._discards:
                self._chunks.append(chunk)
                self._unread_bytes += len(chunk.data)
                self._wake()

    def bound(self, unread_bytes: int | None) -> None:
        """Let `room` wait while more bytes than that are unread; None: never."""
        self._bound = unread_bytes
        self._wake()

    async def room(self) -> None:
        """Wait until there is room for another chunk."""
        while self._bound is not None and self._unread_bytes > self._bound:
            await self._changed.wait()

    def discard(self) -> None:
        """Drop all chunks, later ones included; the stream has no reader any more."""
        self._discards, self._bound = True, None
        self._chunks, self._unread_bytes = [], 0
        self._wake()

    async def after(self, index: int = 0) -> AsyncIterator[pb.DataChunk]:
        """Yield the chunks numbered above `index` without end; the reader stops the iteration."""
        position = index
        while True:
            while position < len(self._chunks):
                position += 1
                yield self._chunks[position - 1]
                self._take(position)
            await self._changed.wait()

    def _take(self, position: int) -> None:
        if position > self._taken and not self._discards:
            self._unread_bytes -= sum(len(chunk.data) for chunk in self._chunks[self._taken : position])
            self._taken = position
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
