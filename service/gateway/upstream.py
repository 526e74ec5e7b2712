"""How requests reach engines: what is sent, over which connections, and whether it may be sent again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import aiohttp

_PIECE = 256 * 1024  # of a large body, written as the engine takes it
_CONNECT_S = 10.0
_KEPT_S = 4.0  # vLLM closes a connection after 5 s without a request


@dataclass
class Order:
    """A request as it is to reach an engine.

    Attributes:
        method: HTTP method.
        path: Path.
        query: What of the client's query an engine may see: on Modal a query chooses the container.
        headers: The client's, as they came.
        body: The client's bytes, or most of them; let go of once the engine has them.
        suffix: What stands at their end instead of the rest.
        streams: The client asked for server-sent events.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: list[tuple[bytes, bytes]]
    body: bytes | bytearray | memoryview
    suffix: bytes
    streams: bool


def session() -> aiohttp.ClientSession:
    """Return the connections to all engines: as many as clients need, none decoded, none timed out."""
    tracing = aiohttp.TraceConfig()
    tracing.on_connection_reuseconn.append(_reused)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT_S, ttl_dns_cache=60),
        trace_configs=[tracing],
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


class Sent:
    """How a request was sent: whether sending it again may be a second time."""

    reused = False

    def in_vain(self, error: Exception) -> bool:
        """Tell whether no engine has read it: there was none, or the connection had been closed before."""
        if isinstance(error, aiohttp.ClientConnectorError):
            return True
        answered = isinstance(error, aiohttp.ServerDisconnectedError) and not isinstance(error.message, str | None)
        return self.reused and isinstance(error, aiohttp.ClientConnectionError | ConnectionError) and not answered


async def _reused(_: object, context: SimpleNamespace, __: object) -> None:
    if isinstance(context.trace_request_ctx, Sent):
        context.trace_request_ctx.reused = True


def data_of(order: Order) -> bytes | AsyncIterator[bytes | memoryview] | None:
    """Return the body to send; a large one in pieces, as the engine takes them."""
    if order.method == "GET":
        return None
    if len(order.body) <= _PIECE:
        return bytes(order.body) + order.suffix if order.suffix else bytes(order.body)
    return _pieces(order.body, order.suffix)


async def _pieces(body: bytes | bytearray | memoryview, suffix: bytes) -> AsyncIterator[bytes | memoryview]:
    view = memoryview(body)
    for begin in range(0, len(view), _PIECE):
        yield view[begin : begin + _PIECE]
    if suffix:
        yield suffix
