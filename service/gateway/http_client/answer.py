"""The answer of an engine, as far as it has arrived."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.gateway.http_client.connection import Connection

Headers = list[tuple[bytes, bytes]]
PassOn = Callable[[bytes], bool]
_HIGH_WATER = 128 * 1024  # bytes that nobody has taken: above it reading pauses


class EngineConnectionError(ConnectionError):
    """A connection did not bring the answer, or not all of it.

    Args:
        message: What happened.
        has_answered: Whether anything of the answer had arrived.
    """

    def __init__(self, message: str, *, has_answered: bool) -> None:
        super().__init__(message)
        self.has_answered = has_answered


class ConnectError(OSError):
    """No connection could be opened: nobody has seen the request. Its text tells why, and needs no errno before it."""

    def __str__(self) -> str:
        """Return the text alone."""
        return self.strerror or ""


class Answer:
    """The answer to one request.

    Attributes:
        status: HTTP status; 0 until the head is here.
        headers: With names in lower case.
        is_complete: The whole body has arrived.
    """

    __slots__ = (
        "_buffered", "_connection", "_failure", "_is_paused", "_loop", "_pass_on", "_pieces", "_waiter", "headers",
        "is_complete", "status",
    )  # fmt: skip

    def __init__(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        self.status = 0
        self.headers: Headers = []
        self.is_complete = False
        self._connection: Connection | None = connection
        self._loop = loop
        self._failure: tuple[str, bool] | None = None
        self._pieces: list[bytes] = []
        self._buffered = 0
        self._is_paused = False
        self._pass_on: PassOn | None = None
        self._waiter: asyncio.Future[None] | None = None

    def header(self, name: bytes) -> str:
        """Return a header's value; empty when there is none."""
        for given, value in self.headers:
            if given == name:
                return value.decode("latin-1")
        return ""

    @property
    def media_type(self) -> str:
        """The media type of the body, in lower case."""
        return self.header(b"content-type").partition(";")[0].strip().lower()

    async def begun(self) -> None:
        """Wait for the head.

        Raises:
            EngineConnectionError: It does not come.
        """
        while not self.status:
            await self._next()

    async def read(self, pass_on: PassOn | None = None) -> bytes:
        """Return what has arrived of the body, as soon as there is something; nothing at its end.

        Args:
            pass_on: Takes what arrives meanwhile, without this call's return: a task that runs for each piece of a
                stream costs more than the piece. Where it returns false it has taken nothing.

        Raises:
            EngineConnectionError: The rest does not come.
        """
        while not self._pieces:
            if self.is_complete:
                return b""
            self._pass_on = pass_on
            try:
                await self._next()
            finally:
                self._pass_on = None
        pieces, self._pieces, self._buffered = self._pieces, [], 0
        if self._is_paused:
            self._resume()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def read_all(self, limit: int) -> bytes:
        """Return the body, or as much of it as came before so many bytes were there.

        Raises:
            EngineConnectionError: The rest does not come.
        """
        body = bytearray()
        while len(body) < limit and (piece := await self.read()):
            body += piece
        return bytes(body)

    @property
    def has_ended(self) -> bool:
        """Whether the whole body has arrived and was read."""
        return self.is_complete and not self._pieces

    def close(self) -> None:
        """Take nothing more; the connection ends unless the answer is complete."""
        connection, self._connection = self._connection, None
        if connection:
            connection.transport.abort()

    def _next(self) -> asyncio.Future[None]:
        """Return what ends once more has arrived."""
        if self._failure:
            message, has_answered = self._failure
            raise EngineConnectionError(message, has_answered=has_answered)
        self._waiter = self._loop.create_future()
        return self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def begin(self, status: int, headers: Headers) -> None:
        """Take the head."""
        self.status, self.headers = status, headers
        self._wake()

    def feed(self, piece: bytes) -> None:
        """Take a piece of the body."""
        self._pieces.append(piece)
        self._buffered += len(piece)
        connection = self._connection
        if (
            self._buffered > _HIGH_WATER
            and not self._is_paused
            and connection
            and not connection.transport.is_closing()
        ):
            self._is_paused = True
            connection.transport.pause_reading()

    def deliver(self) -> None:
        """Pass on what has arrived of the body in one read, or wake who waits for it."""
        pieces = self._pieces
        if not pieces:
            return
        if self._pass_on and self._pass_on(pieces[0] if len(pieces) == 1 else b"".join(pieces)):
            self._pieces, self._buffered = [], 0
            if self._is_paused:
                self._resume()
        else:
            self._wake()

    def complete(self) -> None:
        """Take the end of the body; the connection is no longer this answer's."""
        if self._is_paused:
            self._resume()
        self.is_complete, self._connection = True, None
        self._wake()

    def _resume(self) -> None:
        self._is_paused = False
        if self._connection and not self._connection.transport.is_closing():
            self._connection.transport.resume_reading()

    def fail(self, message: str, *, has_answered: bool) -> None:
        """Take note that nothing more will come, and why."""
        self._failure, self._connection = (message, has_answered), None
        self._wake()
