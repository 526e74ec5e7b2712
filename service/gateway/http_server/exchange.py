"""One HTTP request and its answer, as an ASGI application receives and sends them."""

from __future__ import annotations

import asyncio
import http
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

from service.gateway.http_server.head import Head, status_line
from service.in_engine.vllm_service.api_error import Message, Receive, Send

if TYPE_CHECKING:
    from service.gateway.http_server.connection import Connection

App = Callable[[Message, Receive, Send], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

ON_LEAVE = "service.on_leave"  # extension of the scope: takes what is called when the client leaves
WRITE_NOW = "service.write_now"  # extension of the scope: `Exchange.write_now`
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_CLOSE = b"\r\nconnection: close\r\n\r\n"
_WITHOUT_BODY = frozenset((204, 304))
_FRAMING = frozenset((b"connection", b"keep-alive", b"transfer-encoding"))  # the server's own
_SHORT = 64 * 1024  # bytes of a body that nobody reads: so many are read and dropped to keep the connection
_log = logging.getLogger(__name__)


class Exchange:
    """A request whose head has arrived, and its answer.

    Args:
        connection: Where it came from.
        head: The request's.
        scope: The head's, of ASGI.
    """

    __slots__ = (
        "_chunked", "_connection", "_delivered", "_expects_continue", "_has_body", "_head", "_left", "_length",
        "_on_leave", "_pieces", "_received", "_waiter", "body_complete", "buffered", "ended", "gone", "keep_alive",
        "scope", "started",
    )  # fmt: skip

    def __init__(self, connection: Connection, head: Head, scope: Message) -> None:
        self.scope, self.keep_alive = scope, head.keep_alive
        self.buffered = 0  # bytes of the body that the application has not taken yet
        self.body_complete = self.ended = self.gone = False
        self._connection, self._length, self._expects_continue = connection, head.length, head.expects_continue
        self._pieces: list[bytes] = []
        self._received = 0
        self._delivered = self.started = self._chunked = self._has_body = False
        self._head = b""  # of the answer, while it waits for the first piece of the body
        self._left: int | None = None  # bytes that the answer still owes, where it declares a length
        self._waiter: asyncio.Future[None] | None = None
        self._on_leave: Callable[[], None] | None = None

    def _set_on_leave(self, call: Callable[[], None] | None) -> None:
        """Take what is called when the client leaves before its answer is complete; None: nothing."""
        self._on_leave = call
        if call and self.gone:
            call()

    async def run(self, app: App) -> None:
        """Let the application answer; an answer that it leaves incomplete ends the connection."""
        broke_off = True
        self.scope["extensions"] = {ON_LEAVE: self._set_on_leave, WRITE_NOW: self.write_now}
        try:
            await app(self.scope, self.receive, self.send)
            broke_off = False
        except ConnectionError:
            pass  # the application's way to break an answer off
        except Exception:  # noqa: BLE001 - whatever an application does, the server goes on
            _log.exception("%s %s failed.", self.scope["method"], self.scope["path"])
            broke_off = False
        finally:
            if not self.ended and not self.gone:
                self._connection.break_off(self, with_error=not self.started and not broke_off)
            self.scope = {}  # it refers to this exchange, and garbage is collected rarely

    def feed(self, piece: bytes) -> None:
        """Take a piece of the body."""
        self._received += len(piece)
        if not self.ended and not self.gone:
            self._pieces.append(piece)
            self.buffered += len(piece)
            self._wake()

    def complete_body(self) -> None:
        """Note that the body has arrived whole."""
        self.body_complete = True
        self._wake()

    def disconnect(self) -> None:
        """Note that the client has left: whatever is sent from now on is dropped."""
        self.gone = True
        self._wake()
        if self._on_leave:
            self._on_leave()

    async def receive(self) -> Message:
        """Return the next piece of the body, and after its end, once the client left or got its answer, that."""
        while not self.gone and not self.ended:
            if self._pieces or (self.body_complete and not self._delivered):
                return self._take()
            if self._expects_continue and not self.started and not self._received:
                self._expects_continue = False
                self._connection.transport.write(_CONTINUE)
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return {"type": "http.disconnect"}

    def _take(self) -> Message:
        pieces, self._pieces = self._pieces, []
        self.buffered = 0
        self._delivered = self.body_complete
        self._connection.adjust_reading()
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return {"type": "http.request", "body": body, "more_body": not self.body_complete}

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def send(self, message: Message) -> None:
        """Write the head of the answer or a piece of its body, as fast as the client reads.

        Raises:
            RuntimeError: This message is not one that may follow the last.
        """
        if self._connection.writable is not None:
            await self._connection.writable.wait()
        if self.gone:
            return
        kind = message["type"]
        if kind == "http.response.body" and self.started and not self.ended:
            self._write_body(message.get("body", b""), message.get("more_body", False))
        elif kind == "http.response.start" and not self.started:
            self._write_head(message["status"], message.get("headers", ()))
        else:
            raise RuntimeError(f"The application sent '{kind}' where it may not follow.")

    def write_now(self, body: bytes) -> bool:
        """Write a piece of a body of any length at once; false: `send` must, since it has to wait for the client."""
        if not self._chunked or self.ended or self.gone or self._connection.writable is not None:
            return False
        self._write_body(body, more=True)
        return True

    def _write_head(self, status: int, headers: Headers) -> None:
        shared = self._connection.shared
        lines, length, has_date = [status_line(status)], None, False
        for given, value in headers:
            name = given.lower()
            if name in _FRAMING:
                self.keep_alive = self.keep_alive and not (name == b"connection" and b"close" in value.lower())
                if value != b"Upgrade":  # which stands beside the header Upgrade: RFC 9110, section 7.8
                    continue
            if name == b"content-length":
                length = int(value)
            elif name == b"date":
                has_date = True
            lines.append(b": ".join((name, value)))
        if not has_date:
            lines.append(shared.date)
        if self.scope["method"] != "HEAD" and status not in _WITHOUT_BODY:
            self._has_body = True
            self._left = length
            if length is None and self.scope["http_version"] == "1.1":
                self._chunked = True
                lines.append(b"transfer-encoding: chunked")
            elif length is None:
                self.keep_alive = False  # the end of the connection is that of the body
        if shared.stopping or status == http.HTTPStatus.REQUEST_TIMEOUT or not self._rest_is_short():
            self.keep_alive = False
        head = b"\r\n".join(lines)
        if not head.count(b"\n") == head.count(b"\r") == len(lines) - 1:
            raise RuntimeError("A header of the answer contains a line break.")
        self.started = True
        self._head = head + (shared.keep_alive if self.keep_alive else _CLOSE)
        asyncio.get_running_loop().call_soon(self.flush)  # the body's first piece, if it comes now, shares its packet

    def flush(self) -> None:
        """Write the head where it still waits for a piece of the body."""
        if self._head and not self.gone:
            self._connection.transport.write(self._head)
        self._head = b""

    def _rest_is_short(self) -> bool:
        if self.body_complete:
            return True
        return not self._expects_continue and self._length is not None and self._length - self._received <= _SHORT

    def _write_body(self, body: bytes, more: bool) -> None:
        if self._left is not None:
            self._left -= len(body)
            if self._left < 0 or (self._left and not more):
                raise RuntimeError(f"The body of the answer differs from its Content-Length by {-self._left:+} bytes.")
        if self._chunked:
            chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            body = chunk if more else chunk + b"0\r\n\r\n"
        if not self._has_body:
            body = b""
        if self._head or body:
            self._connection.transport.write(self._head + body if self._head else body)
            self._head = b""
        if not more:
            self.ended = True
            self._wake()
            self._connection.answered(self)
