"""Requests to engines: what is sent, over which connections, and whether it may be sent again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import aiohttp

_PIECE = 256 * 1024  # bytes of a large body that are written at a time
_CONNECT_S = 10.0
_KEPT_S = 4.0  # vLLM closes a connection after 5 s without a request


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
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: list[tuple[bytes, bytes]]
    body: bytes | bytearray | memoryview
    suffix: bytes
    streams: bool


def open_session() -> aiohttp.ClientSession:
    """Return connections to the engines, without a limit of their number, a timeout of answers or decompression."""
    tracing = aiohttp.TraceConfig()
    tracing.on_connection_reuseconn.append(_mark_reused)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT_S, ttl_dns_cache=60),
        trace_configs=[tracing],
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


class Attempt:
    """One attempt to send a request."""

    reused = False

    def is_safe_to_retry(self, error: Exception) -> bool:
        """Tell whether no engine has read the request: none was there, or the reused connection was closed before."""
        if isinstance(error, aiohttp.ClientConnectorError):
            return True
        answered = isinstance(error, aiohttp.ServerDisconnectedError) and not isinstance(error.message, str | None)
        return self.reused and isinstance(error, aiohttp.ClientConnectionError | ConnectionError) and not answered


async def _mark_reused(_: object, context: SimpleNamespace, __: object) -> None:
    if isinstance(context.trace_request_ctx, Attempt):
        context.trace_request_ctx.reused = True


def request_body(request: UpstreamRequest) -> bytes | AsyncIterator[bytes | memoryview] | None:
    """Return the body to send; a large one in pieces, sent as fast as the engine reads them."""
    if request.method == "GET":
        return None
    if len(request.body) <= _PIECE:
        return bytes(request.body) + request.suffix if request.suffix else bytes(request.body)
    return _pieces(request.body, request.suffix)


async def _pieces(body: bytes | bytearray | memoryview, suffix: bytes) -> AsyncIterator[bytes | memoryview]:
    view = memoryview(body)
    for begin in range(0, len(view), _PIECE):
        yield view[begin : begin + _PIECE]
    if suffix:
        yield suffix
