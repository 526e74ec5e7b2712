"""One client of the load: a connection that repeats a request, times the first byte and counts what it receives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import perf_counter
from typing import cast

import httptools


class LoadError(Exception):
    """A client got another response than 200, or none."""


class Count:
    """What all clients of one piece of work have received since the last `reset`."""

    def __init__(self) -> None:
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.reset()

    def reset(self) -> None:
        """Set all counts to zero."""
        self.began = perf_counter()
        self.requests = self.chunks = self.frames = 0
        self.first_bytes_s: list[float] = []

    def fail(self, sentence: str) -> None:
        """End the work with this message."""
        if not self.failure.done():
            self.failure.set_exception(LoadError(sentence))


class Client(asyncio.Protocol):
    """One connection.

    Args:
        request: The bytes that it sends repeatedly.
        count: Where it counts.
        more: Called before each further request; tells whether to send it.
    """

    def __init__(self, request: bytes, count: Count, more: Callable[[], bool]) -> None:
        self._request, self._count, self._more = request, count, more
        self._parser = httptools.HttpResponseParser(self)
        self._began = self._first = 0.0
        self._line_ended = False
        self._failed = b""
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self.transport = cast("asyncio.Transport", transport)
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        """Report a failure, unless this side closed the connection."""
        if not self.ended.done():
            self.ended.set_result(None)
            self._count.fail(f"the connection ended before the response did: {error or 'closed by the server'}")

    def data_received(self, data: bytes) -> None:
        """Parse a response."""
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """Count frames and server-sent events."""
        count = self._count
        if not self._first:
            self._first = perf_counter()
            if self._began >= count.began:
                count.first_bytes_s.append(self._first - self._began)
            if self._parser.get_status_code() != 200:
                self._failed = body[:300]
            if not self.first.done():
                self.first.set_result(None)
        count.frames += 1
        count.chunks += body.count(b"\n\n") + (self._line_ended and body.startswith(b"\n"))
        self._line_ended = body.endswith(b"\n") and not body.endswith(b"\n\n")

    def on_message_complete(self) -> None:
        """Send the next request, or close."""
        if (status := self._parser.get_status_code()) != 200:
            self._count.fail(f"status {status}: {self._failed.decode(errors='replace')}")
        self._count.requests += 1
        if status == 200 and self._more():
            self._send()
        else:
            self.close()

    def close(self) -> None:
        """Close the connection."""
        if not self.ended.done():
            self.ended.set_result(None)
        self.transport.abort()

    def _send(self) -> None:
        self._first, self._line_ended = 0.0, False
        self._began = perf_counter()
        self.transport.write(self._request)
