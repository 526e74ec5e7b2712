"""Requests to engines: what is sent, over which connections, and whether it may be sent again."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from service.engine.args import KEEP_ALIVE_S
from service.gateway.http_client.answer import Answer, ConnectError, EngineConnectionError
from service.gateway.http_client.connections import Connections

_PIECE = 256 * 1024  # bytes of a large body that are written at a time
_CLOSED_WITHIN_S = 0.5  # of a request, on a connection that was closed before; Modal's proxy may be far away
_OURS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL}
_KEPT_S = KEEP_ALIVE_S - 15.0  # so that the engine never closes a connection just as a request is sent on it


@dataclass
class UpstreamRequest:
    """A request as an engine gets it.

    Attributes:
        method: HTTP method.
        path: Path.
        query: The part of the client's query that an engine may see: on Modal a query chooses the container.
        headers: The client's, unchanged.
        body: The client's bytes, or most of them; released once the engine has them.
        suffix: Replaces the rest of the body.
        streams: The client asked for server-sent events.
        on_release: Called once the engine has the body.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: list[tuple[bytes, bytes]]
    body: bytes | bytearray | memoryview
    suffix: bytes
    streams: bool
    on_release: Callable[[], None] = lambda: None

    def release(self) -> None:
        """Forget the body, which the engine has."""
        self.body = b""
        self.on_release()


def open_connections() -> Connections:
    """Return connections to the engines."""
    return Connections(_KEPT_S)


class Attempt:
    """One attempt to send a request.

    Attributes:
        passes_modal: Modal's proxy may have queued what it has read, whatever becomes of the connection.
        was_queued: It has.
        reused_at: When it was sent on a connection that was there before.
    """

    passes_modal = was_queued = False
    reused_at: float | None = None

    def is_safe_to_retry(self, error: Exception) -> bool:
        """Tell whether no engine has read the request: none was there, or the reused connection was closed before.

        That shows at once. Where the connection ends later, an engine had the request and may have died of it.
        """
        if self.was_queued:
            return False
        if isinstance(error, ConnectError):
            return True
        if self.passes_modal or not isinstance(error, EngineConnectionError) or error.has_answered:
            return False
        return self.reused_at is not None and time.monotonic() - self.reused_at < _CLOSED_WITHIN_S

    def mark_reused(self) -> None:
        """Note that it is sent on a connection that was there before."""
        self.reused_at = time.monotonic()


def is_own_shortage(error: Exception) -> bool:
    """Tell whether this process lacks what a connection takes: that says nothing about the engine."""
    return isinstance(error, OSError) and error.errno in _OURS


def retry_after(answer: Answer) -> float | None:
    """Return the seconds after which an answer wants the next attempt, 60 at most; None: it does not say."""
    text = answer.header(b"retry-after").strip()
    return min(float(text), 60.0) if text.isdecimal() and len(text) < 10 else None


def inline_body(request: UpstreamRequest) -> bytes:
    """Return a short body, to send with the head; empty where it is sent in pieces, or there is none."""
    if request.method == "GET" or len(request.body) > _PIECE:
        return b""
    return bytes(request.body) + request.suffix if request.suffix else bytes(request.body)


def body_pieces(request: UpstreamRequest) -> list[memoryview | bytes] | None:
    """Return the pieces of a long body, to send as fast as the engine reads them; None: it is short."""
    if request.method == "GET" or len(request.body) <= _PIECE:
        return None
    view = memoryview(request.body)
    pieces: list[memoryview | bytes] = [view[begin : begin + _PIECE] for begin in range(0, len(view), _PIECE)]
    return [*pieces, request.suffix] if request.suffix else pieces
