"""Where connections come from, and how many there are of one address."""

from __future__ import annotations

import asyncio
from collections import Counter
from ipaddress import IPv6Address, ip_address, ip_network


def address_of(transport: asyncio.BaseTransport, name: str) -> tuple[str, int] | None:
    """Return host and port, the first parts of an address of IPv6 too; None: the client has left already."""
    address = transport.get_extra_info(name)
    return (address[0], address[1]) if address else None


class AddressCounts:
    """Connections of each address. Those from this machine, where a proxy may serve everybody, are not counted.

    Args:
        most: Connections of one address; of IPv6 addresses with the same first 64 bits, which one machine has.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._counts: Counter[str] = Counter()

    def add(self, address: tuple[str, int] | None) -> str:
        """Count a connection, and return what it is counted under; empty: it is not."""
        if place := _place(address):
            self._counts[place] += 1
        return place

    def has_too_many(self, place: str) -> bool:
        """Tell whether an address has more connections than it may have."""
        return self._counts[place] > self.most

    def remove(self, place: str) -> None:
        """Count a connection no more."""
        if place:
            self._counts[place] -= 1
            if not self._counts[place]:
                del self._counts[place]


def _place(address: tuple[str, int] | None) -> str:
    if address is None:
        return ""
    host = ip_address(address[0].partition("%")[0])
    if isinstance(host, IPv6Address):
        host = host.ipv4_mapped or host
    if host.is_loopback:
        return ""
    return str(ip_network((host, 64), strict=False)) if isinstance(host, IPv6Address) else str(host)
