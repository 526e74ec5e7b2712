"""The addresses of engines' hosts: looked up once for all who wait, kept for a while, and tried one after another."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from service.gateway.http_client.answer import ConnectError
from service.gateway.http_client.connection import Connection

_LOOKUP_S = 10.0
_KEPT_S = 60.0
_HEAD_START_S = 0.25  # of an address over the next one: RFC 8305, section 5
# Where addresses fail differently: a shortage of this process explains them all, and one without IPv6 explains none.
_RANK = {errno.EMFILE: 0, errno.ENFILE: 0, errno.ENOMEM: 0, errno.ENOBUFS: 0, errno.EADDRNOTAVAIL: 2}


class Addresses:
    """The addresses of hosts; a host that is an address needs no look-up."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._known: dict[str, tuple[float, list[str]]] = {}  # with the time of the look-up; the last good one first
        self._lookups: dict[str, asyncio.Task[list[str]]] = {}

    async def of(self, host: str) -> list[str]:
        """Return the addresses of a host, at least one.

        Raises:
            OSError: It has none, or the look-up took too long (`TimeoutError`).
        """
        if _is_address(host):
            return [host]
        looked_up_at, addresses = self._known.get(host, (0.0, []))
        if addresses and self._loop.time() - looked_up_at < _KEPT_S:
            return addresses
        lookup = self._lookups.get(host)
        if lookup is None:
            lookup = self._lookups[host] = self._loop.create_task(self._look_up(host))
            lookup.add_done_callback(_retrieve)
        done, _ = await asyncio.wait([lookup], timeout=_LOOKUP_S)  # which goes on where this one is cancelled
        if not done:
            raise TimeoutError
        return lookup.result()

    async def _look_up(self, host: str) -> list[str]:
        try:
            found = await self._loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        finally:
            del self._lookups[host]
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        self._known[host] = self._loop.time(), addresses
        return addresses

    def prefer(self, host: str, address: str) -> None:
        """Try this address first from now on."""
        looked_up_at, addresses = self._known.get(host, (0.0, []))
        if address in addresses[1:]:
            others = [other for other in addresses if other != address]
            self._known[host] = looked_up_at, [address, *others]

    def forget(self, host: str) -> None:
        """Look the host up again for the next connection."""
        self._known.pop(host, None)


async def first_open(
    addresses: list[str], open_at: Callable[[str], Coroutine[Any, Any, Connection]]
) -> tuple[str, Connection]:
    """Open a connection to the first address that takes one, each with a head start over the next; return both.

    Raises:
        ConnectError: None takes one.
    """
    left, errors = list(addresses), list[OSError]()
    running: dict[asyncio.Task[Connection], str] = {}
    try:
        while left or running:
            if left:
                address = left.pop(0)
                running[asyncio.ensure_future(open_at(address))] = address
            done, _ = await asyncio.wait(
                running, timeout=_HEAD_START_S if left else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                address = running.pop(task)
                try:
                    return address, task.result()
                except OSError as error:
                    errors.append(error)
    finally:
        for task in running:
            task.cancel()
            task.add_done_callback(_drop)
    decisive = min(errors, key=lambda error: _RANK.get(error.errno or 0, 1), default=OSError("it has no address"))
    raise ConnectError(decisive.errno, "; ".join(dict.fromkeys(map(str, errors or [decisive])))) from decisive


def _drop(task: asyncio.Task[Connection]) -> None:
    """Close a connection that was opened although another one was chosen."""
    if not task.cancelled() and not task.exception():
        task.result().transport.abort()


def _retrieve(lookup: asyncio.Task[list[str]]) -> None:
    """Take note of a failure for which nobody waits any more."""
    if not lookup.cancelled():
        lookup.exception()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
