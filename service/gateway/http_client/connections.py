"""Connections to engines: opened when a request needs one, and kept for the next."""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import Callable, Mapping
from functools import cache, partial
from heapq import nsmallest
from typing import NamedTuple, Self
from urllib.parse import urlsplit

from service.gateway.http_client.addresses import Addresses, first_open
from service.gateway.http_client.answer import Answer, ConnectError
from service.gateway.http_client.connection import Connection
from service.gateway.http_client.head import header_lines, request_head

CONNECT_S = 10.0
_SWEEP_S = 10.0  # between two looks at connections that nobody uses
_CLOSED_AT_ONCE = 4  # of them, where descriptors run out: more than one, since the server takes some as well
_NO_DESCRIPTOR = {errno.EMFILE, errno.ENFILE}


class Origin(NamedTuple):
    """Where a connection leads.

    Attributes:
        is_tls: Whether it is encrypted.
        host: Name or address.
        port: Port.
        authority: Host and port, as the header `Host` has them.
    """

    is_tls: bool
    host: str
    port: int
    authority: str

    @classmethod
    def of(cls, url: str) -> Origin:
        """Return that of a URL.

        Raises:
            ValueError: It is none of `http` or `https`, or has no host.
        """
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError(f"'{parts.scheme}://{parts.hostname or ''}' is no URL of an HTTP server")
        is_tls = parts.scheme == "https"
        return cls(is_tls, parts.hostname, parts.port or (443 if is_tls else 80), parts.netloc.rpartition("@")[2])


class Connections:
    """All connections of one gateway to engines, without a limit of their number.

    Args:
        kept_s: How long one is kept without a request.
    """

    def __init__(self, kept_s: float) -> None:
        self.kept_s = kept_s
        self._loop = asyncio.get_running_loop()
        self._idle: dict[Origin, list[Connection]] = {}  # the one used last is the last
        self._open: set[Connection] = set()
        self._sweep: asyncio.TimerHandle | None = None
        self._addresses = Addresses()

    async def __aenter__(self) -> Self:
        """Return them."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close them."""
        if self._sweep:
            self._sweep.cancel()
        for connection in [*self._open]:
            connection.transport.abort()
        self._idle.clear()
        await asyncio.sleep(0)

    @property
    def idle(self) -> int:
        """How many are kept without a request."""
        return sum(map(len, self._idle.values()))

    async def request(
        self,
        origin: Origin,
        head: bytes,
        pieces: list[memoryview | bytes] | None = None,
        on_reuse: Callable[[], None] | None = None,
    ) -> Answer:
        """Send a request and return its answer, once its head is here.

        Args:
            origin: Where to.
            head: The head, and all of a body that is short.
            pieces: The rest of the body, which is sent as fast as it is read.
            on_reuse: Called where the request is sent on a connection that was there before.

        Raises:
            ConnectError: No connection could be opened, or none in time.
            EngineConnectionError: The connection ended before the head was here.
        """
        connection = self._take(origin)
        if connection is None:
            connection = await self._connect(origin)
        elif on_reuse:
            on_reuse()
        answer = connection.begin(head)
        try:
            if pieces:
                await connection.send(pieces)
            if not answer.status:
                await answer.begun()
        except BaseException:
            answer.close()
            raise
        return answer

    async def get(self, url: str, headers: Mapping[str, str]) -> Answer:
        """GET a URL, and return the answer once its head is here.

        Raises:
            ConnectError, EngineConnectionError: As `request`.
        """
        origin, parts = Origin.of(url), urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        lines = header_lines({"Host": origin.authority, **headers})
        return await self.request(origin, request_head("GET", target, lines, 1 + len(headers)))

    def _take(self, origin: Origin) -> Connection | None:
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.transport.is_closing():
                continue
            if self._loop.time() - connection.idle_since < self.kept_s:
                return connection
            connection.transport.abort()
        return None

    async def _connect(self, origin: Origin) -> Connection:
        try:
            addresses = await self._addresses.of(origin.host)
        except TimeoutError as error:
            raise ConnectError(errno.ETIMEDOUT, f"No address of {origin.host} from the resolver in time.") from error
        except OSError as error:
            raise ConnectError(error.errno, f"No address of {origin.host}: {error}") from error
        try:
            async with asyncio.timeout(CONNECT_S):
                address, connection = await first_open(addresses, partial(self._open_at, origin))
        except TimeoutError as error:
            self._addresses.forget(origin.host)
            message = f"No connection to {origin.authority} within {CONNECT_S:g} s."
            raise ConnectError(errno.ETIMEDOUT, message) from error
        except ConnectError as error:
            self._addresses.forget(origin.host)
            raise ConnectError(error.errno, f"No connection to {origin.authority}: {error}") from error
        self._addresses.prefer(origin.host, address)
        if connection.transport.is_closing():  # its end was told already, and nothing would end an answer
            raise ConnectError(errno.ECONNRESET, f"{origin.authority} closed a connection as soon as it was open.")
        self._open.add(connection)
        return connection

    async def _open_at(self, origin: Origin, address: str) -> Connection:
        try:
            return await self._open_once(origin, address)
        except OSError as error:
            if error.errno not in _NO_DESCRIPTOR or not self._close_oldest():
                raise
        await asyncio.sleep(0)  # until they are closed
        return await self._open_once(origin, address)

    async def _open_once(self, origin: Origin, address: str) -> Connection:
        _, connection = await self._loop.create_connection(
            lambda: Connection(self._loop, partial(self._keep, origin), self._open.discard),
            address,
            origin.port,
            ssl=_tls_context() if origin.is_tls else None,
            server_hostname=origin.host if origin.is_tls else None,
        )
        return connection

    def _close_oldest(self) -> bool:
        """Close those that nobody has used for the longest time; return whether there are any."""
        idle = [one for kept in self._idle.values() for one in kept if not one.transport.is_closing()]
        for connection in nsmallest(_CLOSED_AT_ONCE, idle, key=lambda one: one.idle_since):
            connection.transport.abort()
        return bool(idle)

    def _keep(self, origin: Origin, connection: Connection) -> None:
        connection.idle_since = self._loop.time()
        self._idle.setdefault(origin, []).append(connection)
        if self._sweep is None:
            self._sweep = self._loop.call_later(_SWEEP_S, self._close_old)

    def _close_old(self) -> None:
        self._sweep = None
        before = self._loop.time() - self.kept_s
        for origin, idle in [*self._idle.items()]:
            kept = []
            for connection in idle:
                if connection.idle_since > before and not connection.transport.is_closing():
                    kept.append(connection)
                else:
                    connection.transport.abort()
            if kept:
                self._idle[origin] = kept
            else:
                del self._idle[origin]
        if self._idle:
            self._sweep = self._loop.call_later(_SWEEP_S, self._close_old)


@cache
def _tls_context() -> ssl.SSLContext:
    """Return what checks certificates; made when it is needed, since those of the authorities are 2.7 MB."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
