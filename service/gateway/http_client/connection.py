"""One connection to an engine: one request at a time, whose answer httptools parses."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import cast

import httptools

from service.gateway.http_client.answer import Answer, Headers
from service.in_engine.vllm_service.http_contract import HEAD_LIMIT

_WITHOUT_BODY = frozenset((204, 304))
_INTERIM = 200  # a lower status is none of an answer, such as 100 Continue


class Connection(asyncio.Protocol):
    """One connection.

    Args:
        loop: The event loop.
        on_free: Called when it may take another request.
        on_lost: Called when it has ended.

    Attributes:
        transport: Its socket.
        idle_since: When its last answer ended, by the event loop's clock.
    """

    transport: asyncio.Transport

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_free: Callable[[Connection], None],
        on_lost: Callable[[Connection], None],
    ) -> None:
        self._loop, self._on_free, self._on_lost = loop, on_free, on_lost
        self.idle_since = 0.0
        self._parser = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._headers: Headers = []
        self._writable: asyncio.Future[None] | None = None
        self._is_paused = False  # for writing
        self._is_sending = False  # a body that is written in pieces
        self._is_lost = False
        self._has_received = False  # something, of this answer
        self._in_head = self._is_interim = self._is_whole = self._ends_with_connection = self._keeps = False
        self._no_body = 0  # bytes since the last piece of a body, or somewhat more

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Be ready for a request."""
        self.transport = cast("asyncio.Transport", transport)

    def begin(self, head: bytes) -> Answer:
        """Send a request, or its beginning, and return its answer, which has not arrived yet."""
        self._answer = answer = Answer(self, self._loop)
        self._has_received = self._is_whole = False
        self._no_body = 0
        self.transport.write(head)
        return answer

    async def send(self, pieces: list[memoryview | bytes]) -> None:
        """Send a body, as fast as the engine reads it. An answer that is an error, or complete, ends that."""
        self._is_sending = True
        for piece in pieces:
            if self._is_lost or not self._takes_body():
                return  # it is still sending: nothing else may follow on this connection
            self.transport.write(piece)
            while self._is_paused and not self._is_lost and self._takes_body():
                self._writable = self._loop.create_future()
                await self._writable
        self._is_sending = False

    def _takes_body(self) -> bool:
        return self._answer is not None and self._answer.status < 400

    def pause_writing(self) -> None:
        """Let `send` wait."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """Let `send` go on."""
        self._is_paused = False
        self._look_again()

    def _look_again(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived of an answer."""
        answer = self._answer
        if answer is None:  # nothing was asked
            self.transport.abort()
            return
        self._has_received = True
        self._no_body += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self._is_whole:
                self._fail(f"sent what is no valid HTTP: {error.__context__ or error}")
                return
            self._keeps = False  # it sent more than its answer
        if self._is_whole:
            self._end()
        elif self._no_body > HEAD_LIMIT:
            self._fail(f"sent a head or trailers of over {HEAD_LIMIT} bytes")
        else:
            answer.deliver()

    def _end(self) -> None:
        """Free this connection after an answer, or close it."""
        answer, self._answer = self._answer, None
        if answer:
            answer.complete()
        self._look_again()
        transport = self.transport
        is_sent = not self._is_sending and not transport.get_write_buffer_size()
        if self._keeps and is_sent and not transport.is_closing():
            self._on_free(self)
        else:
            transport.abort()

    def _fail(self, what: str) -> None:
        answer, self._answer = self._answer, None
        if answer:
            answer.fail(f"The engine {what}.", has_answered=self._has_received)
        self._look_again()
        self.transport.abort()

    def eof_received(self) -> None:
        """End the answer: where nothing else tells its end, this is it; any other is broken off."""
        answer = self._answer
        if answer and answer.status and self._ends_with_connection and _ended_by_peer(self.transport):
            self._keeps = False
            self._end()
        else:
            self._fail("closed the connection")

    def connection_lost(self, error: Exception | None) -> None:
        """Break the answer off."""
        self._is_lost = True
        self._on_lost(self)
        answer, self._answer = self._answer, None
        if answer:
            reason = f" ({error})" if error else ""
            answer.fail(f"The engine closed the connection{reason}.", has_answered=self._has_received)
        self._look_again()
        del self._parser  # it and this object refer to each other, and garbage is collected rarely

    def on_message_begin(self) -> None:
        """Begin a head; there is one for an answer, after those that are none yet."""
        if self._is_whole:
            raise ValueError("more than one answer")
        self._in_head, self._headers = True, []

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; what comes after a chunked body is none."""
        if self._in_head:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Tell the answer, unless a further head will follow."""
        parser, headers = self._parser, self._headers
        self._in_head = False
        if self._no_body > HEAD_LIMIT and sum(len(name) + len(value) + 4 for name, value in headers) > HEAD_LIMIT:
            raise ValueError(f"a head of over {HEAD_LIMIT} bytes")
        self._no_body = 0
        status = parser.get_status_code()
        self._is_interim = status < _INTERIM
        if self._is_interim:
            return
        is_framed = status in _WITHOUT_BODY
        for name, value in headers:
            if name == b"content-length":
                is_framed = True
            elif name == b"transfer-encoding":
                if value.rstrip().lower() != b"chunked":
                    raise ValueError(f"a body of the coding {value[:40]!r}")
                is_framed = True
        self._ends_with_connection = not is_framed
        self._keeps = is_framed and parser.should_keep_alive()
        if self._answer:
            self._answer.begin(status, headers)
            self._look_again()

    def on_body(self, piece: bytes) -> None:
        """Pass a piece of the body on."""
        self._no_body = 0
        if self._answer:
            self._answer.feed(piece)

    def on_message_complete(self) -> None:
        """Note the end of the answer."""
        self._is_whole = not self._is_interim


def _ended_by_peer(transport: asyncio.Transport) -> bool:
    """Tell whether the engine ended the stream: over TLS it says so, since anybody can end a TCP connection.

    uvloop reports no other end to a protocol; asyncio does.
    """
    tls = transport.get_extra_info("ssl_object")
    try:
        return tls is None or not tls.read(1)
    except ssl.SSLZeroReturnError:
        return True
    except ssl.SSLError:
        return False
