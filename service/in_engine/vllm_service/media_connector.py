"""Fetches media for vLLM: only from hosts that the entry lists, and only where their names mean public addresses.

vLLM's own connector fetches from anywhere where no host is listed, private addresses included. This one takes its place
by vLLM's own registry and variable (`VLLM_MEDIA_CONNECTOR`). `media_urls` has looked at most URLs before.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_service import media_urls

NAME = "vllm_service"


def enable() -> None:
    """Register the connector."""
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

    MEDIA_CONNECTOR_REGISTRY.register(NAME)(_connector_class())


def is_public(address: str) -> bool:
    """Tell whether anybody may reach an IP address, also one that holds an IPv4 address inside."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def _connector_class() -> type:
    from vllm.exceptions import VLLMValidationError
    from vllm.multimodal.media import MediaConnector

    @contextmanager
    def _invalid_if_unreadable(url: str) -> Iterator[None]:
        """Whatever a decoder raises at data of a client is the client's error."""
        try:
            yield
        except (ValueError, MemoryError):
            raise
        except Exception as error:
            if not media_urls.has_data(url):
                raise
            reason = f"({type(error).__name__})"
            raise VLLMValidationError(
                f"The data of a data: URL cannot be read as its kind of media {reason}."
            ) from error

    class ListedHosts(MediaConnector):
        """The connector of vLLM for data in URLs and for listed hosts."""

        def __init__(self, *args: Any, allowed_media_domains: list[str] | None = None, **kwargs: Any) -> None:
            self._hosts = tuple(allowed_media_domains or ())
            kwargs["allowed_local_media_path"] = ""
            connection = _connection(self._hosts)
            super().__init__(*args, connection=connection, allowed_media_domains=allowed_media_domains, **kwargs)

        def load_from_url(self, url: str, *args: Any, **kwargs: Any) -> Any:
            """Load data; the API server fetches by `load_from_url_async` alone."""
            self._check(url, ())
            with _invalid_if_unreadable(url):
                return super().load_from_url(url, *args, **kwargs)

        async def load_from_url_async(self, url: str, *args: Any, **kwargs: Any) -> Any:
            """Load data, or fetch from a listed host."""
            self._check(url, self._hosts)
            with _invalid_if_unreadable(url):
                return await super().load_from_url_async(url, *args, **kwargs)

        def _check(self, url: str, hosts: tuple[str, ...]) -> None:
            if not media_urls.is_allowed(url, hosts):
                raise VLLMValidationError(f"A URL is not allowed; {media_urls.explanation(self._hosts)}")

    return ListedHosts


@functools.lru_cache
def _connection(hosts: tuple[str, ...]) -> Any:
    """Return the connections to these hosts, which are kept."""
    import aiohttp
    from vllm.connections import HTTPConnection
    from vllm.exceptions import VLLMValidationError

    class PublicAddresses(aiohttp.ThreadedResolver):
        """Looks a listed host up, and refuses it where one of its addresses is private; no OSError is repeated."""

        async def resolve(self, host: str, *args: Any, **kwargs: Any) -> Any:
            found = await super().resolve(host, *args, **kwargs) if host in hosts else []
            if not found or not all(is_public(one["host"]) for one in found):
                raise VLLMValidationError(f"The host '{host}' of a URL has no public address.")
            return found

    class Connection(HTTPConnection):
        async def get_async_client(self) -> aiohttp.ClientSession:
            """Return the session; it heeds no proxy, since a proxy would look names up itself."""
            if self._async_client is None:
                connector = aiohttp.TCPConnector(resolver=PublicAddresses())
                self._async_client = aiohttp.ClientSession(connector=connector)
            return self._async_client

    return Connection()
