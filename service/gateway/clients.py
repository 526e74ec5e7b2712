"""Who may come in, for which models, how often and how many at once."""

from __future__ import annotations

import hmac
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import UnknownModelError, UsageError, did_you_mean
from service.gateway.api_errors import Refusal
from service.in_engine.vllm_service import http_contract
from service.keys import digest
from service.registry.models import Registry
from service.validation import explain

ANONYMOUS = "anonymous"  # whom requests are counted under where no key is asked for
_MINUTE_S = 60.0


class KeyLimits(BaseModel):
    """What `API_LIMITS` says of one name; what is left out is unlimited."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    models: list[str] | None = None
    requests_per_minute: int | None = Field(None, ge=1)
    concurrency: int | None = Field(None, ge=1)


class Client:
    """The holder of a key: its name, its limits, and what it is using of them.

    Args:
        name: What it is called in metrics and access lines.
        limits: What it may.
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
        self._began: deque[float] = deque()  # of the last minute
        self._running = 0

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request for as long as it runs.

        Raises:
            Refusal: 429; `Retry-After` says when the next one may come.
        """
        self._check_concurrency()
        self._check_rate()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def check_model(self, key: str, asked: str) -> None:
        """Refuse a model that this key is not for.

        Raises:
            Refusal: 403.
        """
        if self.models is not None and key not in self.models:
            raise Refusal(
                403,
                f"The key '{self.name}' may not use model '{asked}'; it may use {', '.join(sorted(self.models))}.",
                kind="permission_error",
                code="model_not_allowed",
                param="model",
            )

    def _check_concurrency(self) -> None:
        most = self._limits.concurrency
        if most is not None and self._running >= most:
            raise _too_many(f"The key '{self.name}' has {self._running} requests running, of {most} at once.", 1)

    def _check_rate(self) -> None:
        most = self._limits.requests_per_minute
        if most is None:
            return
        now = self._clock()
        while self._began and self._began[0] <= now - _MINUTE_S:
            self._began.popleft()
        if len(self._began) >= most:
            wait_s = max(1, round(self._began[0] + _MINUTE_S - now + 0.5))
            raise _too_many(f"The key '{self.name}' had {most} requests in a minute, which is its limit.", wait_s)
        self._began.append(now)


class Keyring:
    """All keys, as digests.

    Args:
        digests: SHA-256 in hexadecimal -> name, as `keys.digests` returns it; empty: nobody is asked for a key.
        limits: By name.
        models: Keys of models by name, for those who may not use all.
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
            name: Client(name, limits.get(name), models.get(name), clock) for name in {*digests.values(), ANONYMOUS}
        }
        self._clients = [(digest, clients[name]) for digest, name in digests.items()]
        self._anonymous = None if digests else clients[ANONYMOUS]

    def find(self, headers: Iterable[tuple[bytes, bytes]]) -> Client | None:
        """Return whose key the headers carry, or None. Takes as long whichever key it is, and for none of them."""
        if self._anonymous:
            return self._anonymous
        shown = digest(http_contract.key_of(headers))
        found = None
        for known, client in self._clients:
            if hmac.compare_digest(shown, known):
                found = client
        return found


def load_limits(environ: Mapping[str, str], names: Iterable[str]) -> dict[str, KeyLimits]:
    """Read `API_LIMITS`: a JSON object, name of a key -> its limits.

    Raises:
        UsageError: It is no such object, or names a key that is not there.
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
            'API_LIMITS is not a JSON object such as {"alice": {"models": ["qwen3-8b"], "requests_per_minute": 60, '
            '"concurrency": 4}}.'
        ) from error
    known = set(names)
    for name in found:
        if name not in known:
            raise UsageError(
                f"API_LIMITS limits '{name}', and no key has that name.{did_you_mean(name, known)} "
                f"Keys: {', '.join(sorted(known)) or 'none'} (API_KEY is 'default')."
            )
    return found


def load_keyring(environ: Mapping[str, str], digests: Mapping[str, str], registry: Registry, default: str) -> Keyring:
    """Return the keyring that the environment describes.

    Raises:
        UsageError: `API_LIMITS` is wrong, or allows a model that no entry answers to.
    """
    limits = load_limits(environ, digests.values())
    models = {
        name: frozenset(_model(name, model, registry, default) for model in limit.models)
        for name, limit in limits.items()
        if limit.models is not None
    }
    return Keyring(digests, limits, models)


def _model(name: str, model: str, registry: Registry, default: str) -> str:
    try:
        choice = registry.resolve(model, default)
    except UnknownModelError as error:
        raise UsageError(f"API_LIMITS of '{name}': {error}") from error
    if choice.gpu:
        raise UsageError(
            f"API_LIMITS of '{name}' names '{model}': a key is limited to models, on whatever GPU. "
            f"Write '{choice.spec.key}'."
        )
    return choice.spec.key


def _too_many(message: str, wait_s: int) -> Refusal:
    return Refusal(
        429,
        f"{message} Try again in {wait_s} s.",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(wait_s)},
    )
