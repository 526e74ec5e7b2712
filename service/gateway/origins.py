"""Which web pages may use the service: CORS, and the names that a service without keys answers to.

A browser lets any page send requests to any address, loopback included. With keys a page can do nothing with that: it
has none. Without keys two rules keep foreign pages out. The `Origin` that browsers add must be known. So must the
`Host`, since a page can reach this machine under a name of its own site (DNS rebinding), and to the browser that is the
page's own origin.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Iterable

from service.in_engine.vllm_service import http_contract
from service.in_engine.vllm_service.api_error import APIError, Message, Send
from service.settings import Settings

_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/?#@\[\]]+?)\.?(?::\d*)?", re.IGNORECASE)
_METHODS = ", ".join(sorted({"HEAD", *(method for routes in http_contract.ROUTES.values() for method in routes)}))
_MAX_AGE_S = 600
_HEADERS_LIMIT = 4096  # bytes of the headers that a preflight asks for; a browser's list has a tenth of it
_SHOWN = 200  # characters of a foreign name in an error
_VARY = b"Origin"
_VARY_PREFLIGHT = b"Origin, Access-Control-Request-Method, Access-Control-Request-Headers"


class OriginPolicy:
    """What pages of other origins may do.

    Args:
        cors_origins: Origins whose pages may use the service, or `*` for all.
        allowed_hosts: Names that a service without keys answers to, beside those of the loopback.
    """

    def __init__(self, cors_origins: Iterable[str] = (), allowed_hosts: Iterable[str] = ()) -> None:
        self._origins = frozenset(origin.lower() for origin in cors_origins)
        self._hosts = frozenset(host.lower().strip("[]") for host in allowed_hosts)

    @classmethod
    def from_settings(cls, settings: Settings) -> OriginPolicy:
        """Return the policy that the settings describe."""
        return cls(_split(settings.cors_origins), _split(settings.allowed_hosts))

    def check_local(self, scope: Message) -> None:
        """Refuse a request that a page of a foreign site may have caused; for a service without keys.

        Raises:
            APIError: 403; it names the setting that allows the request.
        """
        for name, value in scope["headers"]:
            if name == b"host" and not self._is_known_host(value.decode("latin-1")):
                host = value.decode("latin-1")[:_SHOWN]
                raise _forbidden(
                    f"Host '{host}' is not a name of this machine. Without keys the service answers to no other name, "
                    "since a web page could reach it under one (DNS rebinding).",
                    f"SERVICE_ALLOWED_HOSTS={_hostname(host) or '<name>'}",
                    "host_not_allowed",
                )
            if name == b"origin" and not self._is_known_origin(value.decode("latin-1").lower()):
                origin = value.decode("latin-1")[:_SHOWN]
                raise _forbidden(
                    f"A page of origin '{origin}' sent this request. Without keys the service answers to pages of this "
                    "machine only.",
                    f"SERVICE_CORS_ORIGINS={origin if '://' in origin else '*'}",
                    "origin_not_allowed",
                )

    def with_headers(self, scope: Message, send: Send) -> Send:
        """Return a `send` that tells the browser whether the page may read the answer."""
        if not self._origins:
            return send
        added = [] if "*" in self._origins else [(b"vary", _VARY)]
        if allowed := self._allowed_origin(scope):
            added += [(b"access-control-allow-origin", allowed), (b"access-control-expose-headers", b"*")]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        return send_with_headers

    async def answer_preflight(self, scope: Message, send: Send) -> None:
        """Answer 204; without the headers of CORS unless the origin is allowed, which the browser takes as a no.

        It needs no key, since browsers send none with it, and no route: the page may read the 404 that follows.
        """
        headers = [(b"vary", _VARY_PREFLIGHT)]
        if allowed := self._allowed_origin(scope):
            headers += [
                (b"access-control-allow-origin", allowed),
                (b"access-control-allow-methods", _METHODS.encode()),
                (b"access-control-max-age", str(_MAX_AGE_S).encode()),
            ]
            if asked := dict(scope["headers"]).get(b"access-control-request-headers"):
                # those that it asks for, since `*` does not include Authorization
                headers.append((b"access-control-allow-headers", asked[:_HEADERS_LIMIT]))
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    def _allowed_origin(self, scope: Message) -> bytes | None:
        """Return the value of `Access-Control-Allow-Origin`; None where the origin is not allowed or there is none."""
        origin: bytes | None = dict(scope["headers"]).get(b"origin")
        if origin is None or "*" in self._origins:
            return origin and b"*"
        return origin if origin.decode("latin-1").lower() in self._origins else None

    def _is_known_host(self, authority: str) -> bool:
        name = _hostname(authority)
        return _is_loopback_name(name) or name in self._hosts

    def _is_known_origin(self, origin: str) -> bool:
        return not self._origins.isdisjoint((origin, "*")) or self._is_known_host(origin.partition("://")[2])


def is_preflight(scope: Message) -> bool:
    """Tell whether a request is a browser's question before one of another origin."""
    if scope["method"] != "OPTIONS":
        return False
    names = {name for name, _ in scope["headers"]}
    return names >= {b"origin", b"access-control-request-method"}


def _split(names: str | None) -> list[str]:
    return [name.strip() for name in (names or "").split(",") if name.strip()]


def _hostname(authority: str) -> str:
    """Return the name or address of `name:port`, in lower case and without brackets; empty where it is none."""
    found = _AUTHORITY.fullmatch(authority)
    return found[1].lower().strip("[]") if found else ""


@functools.lru_cache(256)
def _is_loopback_name(name: str) -> bool:
    """Tell whether no name server is asked for a name, or it is an address of the loopback."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _forbidden(what: str, setting: str, code: str) -> APIError:
    message = f"{what} Set {setting} to allow it, or set keys (API_KEYS)."
    return APIError(403, message, code=code)
