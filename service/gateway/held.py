"""Requests that are held for pools which are not ready: how many, of which keys, and in which order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from service.gateway.pool import Pool
from service.in_engine.vllm_service.api_error import APIError
from service.keys import ANONYMOUS
from service.settings import Settings

MAX_HELD, MAX_HELD_PER_KEY = 500, 200  # half and a fifth of what Modal gives the gateway's container at once


class HeldRequest:
    """One held request.

    Args:
        queue: All that are held for the same pool, in the order in which they came.
    """

    def __init__(self, queue: dict[HeldRequest, None]) -> None:
        self._queue = queue

    @property
    def position(self) -> str:
        """Its position, such as `3 of 12`."""
        return f"{list(self._queue).index(self) + 1} of {len(self._queue)}"


class HeldRequests:
    """All held requests of a gateway.

    Args:
        per_pool: The most that are held for one pool.
        per_key: The most that are held of one key; where no key is needed there is no such limit.
    """

    def __init__(self, per_pool: int = MAX_HELD, per_key: int = MAX_HELD_PER_KEY) -> None:
        self._per_pool, self._per_key = per_pool, per_key
        self._queues: dict[Pool, dict[HeldRequest, None]] = {}
        self._keys: Counter[str] = Counter()

    @classmethod
    def from_settings(cls, settings: Settings) -> HeldRequests:
        """Return them with the limits of the settings."""
        return cls(settings.max_held, settings.max_held_per_key)

    def count(self, pool: Pool) -> int:
        """Return how many are held for a pool."""
        return len(self._queues.get(pool, ()))

    @contextmanager
    def hold(self, pool: Pool, key: str) -> Iterator[HeldRequest]:
        """Hold a request while the context lasts.

        Raises:
            APIError: 429: too many of its key are held; 503 `overloaded`: too many are held for the pool.
        """
        queue = self._queues.setdefault(pool, {})
        self._check(pool, key, len(queue))
        held = HeldRequest(queue)
        queue[held] = None
        self._keys[key] += 1
        try:
            yield held
        finally:
            del queue[held]
            self._keys[key] -= 1

    def _check(self, pool: Pool, key: str, held: int) -> None:
        wait_s = pool.retry_after_s
        if key != ANONYMOUS and self._keys[key] >= self._per_key:
            raise APIError(
                429,
                f"The key '{key}' has {self._keys[key]} requests waiting for models that are not ready, which is the "
                f"limit (SERVICE_MAX_HELD_PER_KEY). Try again in {wait_s} s.",
                retry_after_s=wait_s,
            )
        if held >= self._per_pool:
            raise APIError(
                503,
                f"Model '{pool.spec.key}' on {pool.location} is not ready, and {held} requests wait for it, which is "
                f"the limit (SERVICE_MAX_HELD). Try again in {wait_s} s.",
                code="overloaded",
                retry_after_s=wait_s,
            )
