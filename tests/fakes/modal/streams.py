"""Data streams of a call: chunks in order, kept, so that a reader may come late or come again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from modal_proto import api_pb2 as pb


class DataStream:
    """Numbered chunks. A chunk whose number was seen is dropped: the attempt before has delivered it."""

    def __init__(self) -> None:
        self._chunks: list[pb.DataChunk] = []
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._chunks)

    def put(self, chunk: pb.DataChunk) -> None:
        if not chunk.index:
            chunk.index = len(self._chunks) + 1
        if chunk.index == len(self._chunks) + 1:
            self._chunks.append(chunk)
            self._changed.set()
            self._changed = asyncio.Event()

    async def after(self, index: int = 0) -> AsyncIterator[pb.DataChunk]:
        """Yield the chunks numbered above `index` for ever; the reader leaves when it has what it wants."""
        position = index
        while True:
            while position < len(self._chunks):
                position += 1
                yield self._chunks[position - 1]
            await self._changed.wait()
