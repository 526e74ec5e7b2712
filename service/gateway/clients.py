"""All API clients: whose key a request has. Keys and limits may change while it serves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from service.gateway.api_client import ApiClient
from service.gateway.key_set import KeySet, KeySource
from service.in_engine.vllm_service import api_error, http_contract
from service.in_engine.vllm_service.api_error import APIError
from service.keys import ANONYMOUS, digest
from service.registry.models import Registry
from service.usage.limits import NO_LIMITS, KeyLimits

_UNREAD_RETRY_S = 2.0  # keys that cannot be read are tried again this often


class ClientRegistry:
    """All API clients, by the digests of their keys.

    Args:
        digests: SHA-256 in hexadecimal -> name, as `keys.digests` returns it; empty: requests need no key.
        limits: By name.
        models: Keys of models by name, for the clients that may not use all.
        clock: Seconds that never run backwards, for tests.
        wall_clock: Seconds since 1970, for tests.
    """

    def __init__(
        self,
        digests: Mapping[str, str],
        limits: Mapping[str, KeyLimits] | None = None,
        models: Mapping[str, frozenset[str]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock, self._wall_clock = clock, wall_clock
        self._clients: dict[str, ApiClient] = {}
        self._by_digest: dict[str, tuple[ApiClient, float | None]] = {}
        self._anonymous: ApiClient | None = ApiClient(ANONYMOUS, is_anonymous=True)
        self.replace(KeySet(digests, limits or {}, models or {}))

    @classmethod
    def of(cls, keys: KeySet) -> ClientRegistry:
        """Return the clients of these keys."""
        clients = cls({})
        clients.replace(keys)
        return clients

    @property
    def needs_key(self) -> bool:
        """Whether a request must carry a key."""
        return self._anonymous is None

    def __iter__(self) -> Iterator[ApiClient]:
        """Yield all clients that have a key."""
        return iter(self._clients.values())

    def replace(self, keys: KeySet) -> None:
        """Take other keys and limits at once: what a client has used counts on, and requests that run go on.

        Once there were keys, a request without one is refused: the end of the last key lets nobody in.
        """
        clients = {name: self._clients.get(name) or self._new_client(name) for name in keys.names}
        for name, client in clients.items():
            client.allow(keys.limits.get(name) or NO_LIMITS, keys.models.get(name))
            client.identity = keys.identities.get(name, "")
        found = {one: (clients[name], ends_at) for one, (name, ends_at) in keys.stored.items()}
        found |= {one: (clients[name], None) for one, name in keys.digests.items()}
        self._clients, self._by_digest, self._is_complete = clients, found, keys.is_complete
        if found:
            self._anonymous = None

    def authenticate(self, headers: Iterable[tuple[bytes, bytes]]) -> ApiClient | None:
        """Return the client of the first valid key in the headers, or None.

        Only a key's digest is looked up, in a table with hashes of its own, so the time of it tells nothing of a key.
        """
        if self._anonymous:
            return self._anonymous
        found = None
        for key in reversed(http_contract.keys_of(dict(headers))):
            client, ends_at = self._by_digest.get(digest(key), (None, None))
            if client and (ends_at is None or self._wall_clock() < ends_at):
                found = client
        return found

    def named(self, name: str) -> ApiClient | None:
        """Return the client of a name; None: no key has it."""
        return self._anonymous if name == ANONYMOUS else self._clients.get(name)

    def unknown(self) -> APIError:
        """Return the error of a request whose client is not known: 401, or 503 until the keys could first be read."""
        if self._is_complete:
            return api_error.unauthorized()
        message = "The service cannot read its keys now, and this may be one of them."
        message += f" Send the request again in {_UNREAD_RETRY_S:.0f} s."
        return APIError(503, message, code="keys_unavailable", retry_after_s=_UNREAD_RETRY_S)

    def _new_client(self, name: str) -> ApiClient:
        return ApiClient(name, clock=self._clock, wall_clock=self._wall_clock)


def load_clients(
    environ: Mapping[str, str], digests: Mapping[str, str], registry: Registry, default: str
) -> ClientRegistry:
    """Return the API clients that the environment describes.

    Raises:
        UsageError: `API_LIMITS` is wrong, or names a model that the registry does not have.
    """
    return ClientRegistry.of(KeySource(environ, digests, None, default).load(registry))
