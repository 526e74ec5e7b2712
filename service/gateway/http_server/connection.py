"""One client's connection: its requests are answered in order, within the limits of time.

What a client still sends after an answer that ends the connection is read and dropped for a while, so that the client
can read this answer (RFC 9112, section 9.6). An idle connection is closed so too, unless a request has arrived.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any, cast

from service.gateway.http_server.addresses import address_of
from service.gateway.http_server.exchange import Exchange
from service.gateway.http_server.head import Head, answer
from service.gateway.http_server.limits import Shared
from service.gateway.http_server.parser import RequestParser
from service.gateway.http_server.sockets import has_unread
from service.in_engine.vllm_service import api_error
from service.in_engine.vllm_service.api_error import APIError

_HIGH_WATER = 64 * 1024  # bytes of a body that the application has not taken: above it reading pauses
_PIPELINED = 8  # requests that wait for their turn: from so many on reading pauses
_PIPELINED_MOST = 256  # the same, of one read: the connection ends after them
_NEVER = math.inf
_SCOPE = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "scheme": "http", "root_path": ""}
_AT_NEXT_SWEEP = 0.0


class Connection(asyncio.Protocol):
    """One connection.

    Attributes:
        shared: What it has in common with others.
        transport: Its socket.
        writable: Set once the client has read enough; None: it may be written to.
    """

    transport: asyncio.Transport

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.writable: asyncio.Event | None = None
        self._loop = asyncio.get_running_loop()
        self._parser: RequestParser | None = None
        self._scope: dict[str, Any] = {}
        self._place = ""  # what it is counted under
        self._answering: Exchange | None = None
        self._queue: list[Exchange] = []  # wait for their turn
        self._last: Exchange | None = None  # its body may be incomplete
        self._refusal = b""  # the last answer, after those to the requests before
        self._ignores = self._is_head_timed = self._is_reading_paused = self._was_idle = False
        self._deadline = self._write_deadline = self._linger_until = _NEVER
        self._overdue: Callable[[Connection], None] = Connection.close  # no method of this one: that were a cycle
        self._dropped = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request; with too many connections in the place of the one that has waited longest."""
        self.transport = cast("asyncio.Transport", transport)
        shared = self.shared
        shared.connections.add(self)
        shared.empty.clear()
        client = address_of(transport, "peername")
        self._scope = {**_SCOPE, "server": address_of(transport, "sockname"), "client": client}
        self._place = shared.addresses.add(client)
        if shared.addresses.has_too_many(self._place):
            self._refuse_address()
        elif error := shared.make_room():
            self._refuse(error)
        else:
            self._wait(shared.limits.first_byte_s)

    def connection_lost(self, error: Exception | None) -> None:
        """Tell the application that the client has left."""
        del error
        self.resume_writing()
        shared = self.shared
        shared.connections.discard(self)
        shared.waiting.pop(self, None)
        shared.addresses.remove(self._place)
        if not shared.connections:
            shared.empty.set()
        if self._answering:
            self._answering.disconnect()
        self._queue.clear()
        self._stop_parsing()
        self._answering = self._last = None

    def pause_writing(self) -> None:
        """Let `send` wait."""
        self.writable = asyncio.Event()
        self._write_deadline = self._loop.time() + self.shared.limits.write_s

    def resume_writing(self) -> None:
        """Let `send` go on."""
        self._write_deadline = _NEVER
        if self.writable:
            self.writable.set()
            self.writable = None

    def data_received(self, data: bytes) -> None:
        """Parse."""
        if self._ignores:
            self._drop(len(data))
            return
        parser = self._parser
        if parser is None:
            self._parser = parser = RequestParser(self, self.shared.limits.head_bytes)
        try:
            parser.feed(data)
        except APIError as error:
            self._refuse(error)
        else:
            if parser.in_head and not self._answering and not self._is_head_timed:
                self._time_head()
            self._count_head(parser)

    def _count_head(self, parser: RequestParser) -> None:
        """Count what an incomplete head takes; with too much in all refuse the oldest ones."""
        is_incomplete = parser.in_head or (self._last is not None and not self._last.body_complete)  # or its trailers
        for oldest in self.shared.heads.hold(self, parser.held_bytes if is_incomplete else 0):
            oldest._refuse(api_error.too_many_heads())

    def begin_request(self, head: Head) -> None:
        """Answer a request now, or when those before it are answered."""
        self._is_head_timed = False
        self._last = exchange = Exchange(self, head, head.scope(self._scope, self.shared.state))
        if self._answering:
            self._queue.append(exchange)
            self.adjust_reading()
        else:
            self._answer(exchange)

    def feed_body(self, piece: bytes) -> None:
        """Pass a piece of a body on."""
        if self._last:
            self._last.feed(piece)
            if self._last.buffered > _HIGH_WATER:
                self.adjust_reading()

    def end_body(self) -> bool:
        """Pass the end of a body on; return whether the parser goes on."""
        last = self._last
        if last is None:
            return False
        last.complete_body()
        last.keep_alive = last.keep_alive and len(self._queue) < _PIPELINED_MOST
        self._ignores = self._ignores or not last.keep_alive
        if not self._ignores and not self._answering:
            self._wait(self.shared.limits.keep_alive_s)
        return not self._ignores

    def adjust_reading(self) -> None:
        """Read as long as the application takes what arrives."""
        last = self._last
        pause = len(self._queue) >= _PIPELINED or (last is not None and last.buffered > _HIGH_WATER and not last.ended)
        if pause != self._is_reading_paused and not self.transport.is_closing():
            self._is_reading_paused = pause
            (self.transport.pause_reading if pause else self.transport.resume_reading)()

    def _answer(self, exchange: Exchange) -> None:
        self._answering = exchange
        self._deadline = _NEVER
        self.shared.waiting.pop(self, None)
        task = self._loop.create_task(exchange.run(self.shared.app))
        self.shared.tasks.add(task)
        task.add_done_callback(self.shared.tasks.discard)

    def answered(self, exchange: Exchange) -> None:
        """Go on after an answer that is complete."""
        self._answering = None
        if not exchange.keep_alive or self.shared.stopping:
            self._finish(exchange)
        elif self._queue:
            self._answer(self._queue.pop(0))
        elif self._refusal:
            self._write_refusal()
        elif exchange.body_complete:
            self._wait(self.shared.limits.keep_alive_s)
        else:
            self._set_deadline(self.shared.limits.rest_s, Connection.close)
        self.adjust_reading()

    def break_off(self, exchange: Exchange, *, with_error: bool) -> None:
        """End the connection of a request that the application did not answer whole; with an error where one fits."""
        exchange.flush()
        exchange.disconnect()
        self._answering = None
        if with_error:
            message = "The gateway failed at this request. Its log has the reason."
            self._refuse(APIError(500, message))
        else:
            self.close()

    def _refuse(self, error: APIError) -> None:
        """Answer with an error, once requests before are answered, and take no further request."""
        self._refusal = answer(error, self._parser.url if self._parser else b"", self.shared.date)
        self._stop_parsing()
        last, self._last = self._last, None
        if last and not last.body_complete:  # its own body is what is refused
            last.disconnect()
            if last in self._queue:
                self._queue.remove(last)
            elif last is self._answering and last.started:
                self.close()
                return
            elif last is self._answering:
                self._answering = None
        if not self._answering:
            self._write_refusal()

    def _refuse_address(self) -> None:
        """Answer and close at once: what lingers would hold the place of another address's connection."""
        most = self.shared.limits.address_connections
        message = f"Your address has {most} connections to this service, the most of one. Try again in a second."
        error = APIError(503, message, code="too_many_connections", retry_after_s=1)
        self.transport.write(answer(error, b"", self.shared.date))
        self.close()

    def _write_refusal(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(self._refusal)
            self._linger()

    def stop(self) -> None:
        """Close the connection now, or once the request that has arrived is answered."""
        if self._answering or self.transport.is_closing():
            return
        if has_unread(self.transport):
            self._set_deadline(_AT_NEXT_SWEEP, Connection.close)
        else:
            self.close()

    def _close_idle(self) -> None:
        if has_unread(self.transport):
            self._set_deadline(_AT_NEXT_SWEEP, Connection._close_idle)
        elif not self.transport.is_closing():
            self._was_idle = True
            self._linger()

    def close(self) -> None:
        """Close the connection once the client has read what was written."""
        self._ignores = True
        self.shared.waiting.pop(self, None)
        self.transport.close()
        self._set_deadline(self.shared.limits.linger_s, Connection.abort)

    def abort(self) -> None:
        """End the connection at once."""
        self.transport.abort()

    def _finish(self, exchange: Exchange) -> None:
        """Close the connection after an answer, or let the client finish writing first."""
        if exchange is self._last and exchange.body_complete:
            self.close()
        elif not self.transport.is_closing():
            self._linger()

    def _stop_parsing(self) -> None:
        """Take no further request, and free what an incomplete one takes; not for calls of the parser itself."""
        self._ignores = True
        self.shared.heads.release(self)
        if self._parser:
            self._parser.close()
            self._parser = None

    def _linger(self) -> None:
        self._stop_parsing()
        self._queue.clear()
        self.shared.waiting.pop(self, None)
        self.transport.write_eof()
        self._linger_until = self._loop.time() + self.shared.limits.linger_s
        self._set_deadline(self.shared.limits.silence_s, Connection._stop_lingering)
        self.adjust_reading()

    def _drop(self, size: int) -> None:
        if self._was_idle and not self._dropped:
            self.shared.on_late_request()
        self._dropped += size
        if self._dropped > self.shared.limits.linger_bytes:
            self.abort()
        elif self._linger_until != _NEVER:
            self._deadline = min(self._loop.time() + self.shared.limits.silence_s, self._linger_until)

    def _stop_lingering(self) -> None:
        if self.transport.get_write_buffer_size() and self._loop.time() < self._linger_until:
            self._set_deadline(self.shared.limits.silence_s, Connection._stop_lingering)
        else:
            self.abort()

    def _wait(self, seconds: float) -> None:
        """Wait for the next request, or for the rest of its head."""
        self.shared.waiting[self] = None
        if self._parser and self._parser.in_head:
            self._time_head()
        else:
            self._set_deadline(seconds, Connection._close_idle)

    def _time_head(self) -> None:
        self._is_head_timed = True
        self._set_deadline(self.shared.limits.head_s, Connection._refuse_slow_head)

    def _refuse_slow_head(self) -> None:
        message = f"The headers did not arrive within {self.shared.limits.head_s:g} s. Send the whole request again."
        self._refuse(APIError(408, message, code="headers_too_slow"))

    def _set_deadline(self, seconds: float, overdue: Callable[[Connection], None]) -> None:
        self._deadline, self._overdue = self._loop.time() + seconds, overdue

    def check_deadlines(self, now: float) -> None:
        """End what takes too long."""
        if now > self._write_deadline:
            self.abort()
        elif now > self._deadline:
            self._deadline = _NEVER
            self._overdue(self)
