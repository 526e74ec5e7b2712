"""API clients: their keys, the models they may use, and their limits."""

from __future__ import annotations

import hmac
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import UnknownModelError, UsageError, did_you_mean
from service.gateway.api_errors import APIError
from service.in_engine.vllm_service import http_contract
from service.keys import digest
from service.registry.models import Registry
from service.validation import explain

ANONYMOUS = "anonymous"  # the name that requests are counted under where none needs a key
_MINUTE_S = 60.0


class KeyLimits(BaseModel):
    """The limits of one name in `API_LIMITS`; a limit that is left out does not apply."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    models: list[str] | None = None
    requests_per_minute: int | None = Field(None, ge=1)
    concurrency: int | None = Field(None, ge=1)


class ApiClient:
    """An API client: its name, its limits, and how much of them it is using.

    Args:
        name: Its name in metrics and request log.
        limits: How much it may use.
        models: Keys of the models it may use; None: all.
        clock: Seconds, for tests.
    """

    def __init__(
        self,
        name: str,
        limits: KeyLimits | None = None,
        models: frozenset[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.models = name, models
        self._limits = limits or KeyLimits()
        self._clock = clock
        self._began: deque[float] = deque()  # start times of the last minute's requests
        self._running = 0

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while it runs.

        Raises:
            APIError: 429; `Retry-After` says when the next request may come.
        """
        self._check_concurrency()
        self._check_rate()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def check_model(self, key: str, requested: str) -> None:
        """Refuse a model that this client may not use.

        Raises:
            APIError: 403.
        """
        if self.models is not None and key not in self.models:
            raise APIError(
                403,
                f"The key '{self.name}' may not use model '{requested}'; it may use {', '.join(sorted(self.models))}.",
                kind="permission_error",
                code="model_not_allowed",
                param="model",
            )

    def _check_concurrency(self) -> None:
        most = self._limits.concurrency
        if most is not None and self._running >= most:
            raise _too_many(
                f"The key '{self.name}' has {self._running} requests running, and its limit is {most} at once.", 1
            )

    def _check_rate(self) -> None:
        most = self._limits.requests_per_minute
        if most is None:
            return
        now = self._clock()
        while self._began and self._began[0] <= now - _MINUTE_S:
            self._began.popleft()
        if len(self._began) >= most:
            wait_s = max(1, round(self._began[0] + _MINUTE_S - now + 0.5))
            raise _too_many(f"The key '{self.name}' made {most} requests within a minute, which is its limit.", wait_s)
        self._began.append(now)


class ClientRegistry:
    """All API clients, by the digests of their keys.

    Args:
        digests: SHA-256 in hexadecimal -> name, as `keys.digests` returns it; empty: requests need no key.
        limits: By name.
        models: Keys of models by name, for the clients that may not use all.
        clock: Seconds, for tests.
    """

    def __init__(
        self,
        digests: Mapping[str, str],
        limits: Mapping[str, KeyLimits] | None = None,
        models: Mapping[str, frozenset[str]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        limits, models = limits or {}, models or {}
        clients = {
            name: ApiClient(name, limits.get(name), models.get(name), clock) for name in {*digests.values(), ANONYMOUS}
        }
        self._clients = [(digest, clients[name]) for digest, name in digests.items()]
        self._anonymous = None if digests else clients[ANONYMOUS]

    def authenticate(self, headers: Iterable[tuple[bytes, bytes]]) -> ApiClient | None:
        """Return the client whose key the headers carry, or None. Takes the same time for every key, valid or not."""
        if self._anonymous:
            return self._anonymous
        given = digest(http_contract.key_of(headers))
        found = None
        for known, client in self._clients:
            if hmac.compare_digest(given, known):
                found = client
        return found


def load_limits(environ: Mapping[str, str], names: Iterable[str]) -> dict[str, KeyLimits]:
    """Read `API_LIMITS`: a JSON object, name of a key -> its limits.

    Raises:
        UsageError: It is no such object, or names a key that does not exist.
    """
    text = environ.get("API_LIMITS", "").strip()
    if not text:
        return {}
    try:
        table = json.loads(text)
        found = {name: KeyLimits.model_validate(limits) for name, limits in table.items()}
    except ValidationError as error:
        raise UsageError(
            f"API_LIMITS: {' '.join(explain(error, KeyLimits))}", hint=f"Fields: {', '.join(KeyLimits.model_fields)}."
        ) from error
    except (ValueError, AttributeError) as error:
        raise UsageError(
            "API_LIMITS is not a JSON object of limits by name.",
            hint='Write one such as {"alice": {"models": ["qwen3-8b"], "requests_per_minute": 60, "concurrency": 4}}.',
        ) from error
    known = set(names)
    for name in found:
        if name not in known:
            keys = f"Keys: {', '.join(sorted(known)) or 'none'} (API_KEY is 'default')."
            raise UsageError(
                f"API_LIMITS has limits for '{name}', and no key has that name.{did_you_mean(name, known)}", hint=keys
            )
    return found


def load_clients(
    environ: Mapping[str, str], digests: Mapping[str, str], registry: Registry, default: str
) -> ClientRegistry:
    """Return the API clients that the environment describes.

    Raises:
        UsageError: `API_LIMITS` is wrong, or names a model that the registry does not have.
    """
    limits = load_limits(environ, digests.values())
    models = {
        name: frozenset(_model(name, model, registry, default) for model in limit.models)
        for name, limit in limits.items()
        if limit.models is not None
    }
    return ClientRegistry(digests, limits, models)


def _model(name: str, model: str, registry: Registry, default: str) -> str:
    try:
        choice = registry.resolve(model, default)
    except UnknownModelError as error:
        raise UsageError(f"API_LIMITS of '{name}': {error.message}", hint=error.hint) from error
    if choice.gpu:
        raise UsageError(
            f"API_LIMITS of '{name}' lists '{model}', a model on one GPU; expected a model, allowed on every GPU.",
            hint=f"Write '{choice.spec.key}'.",
        )
    return choice.spec.key


def _too_many(message: str, wait_s: int) -> APIError:
    return APIError(
        429,
        f"{message} Try again in {wait_s} s.",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(wait_s)},
    )
