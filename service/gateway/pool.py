"""A pool: the replicas of one model behind one endpoint, which may be cold and can be woken. What all kinds share.

Many requests for a cold pool cause one wake, and continue in the order in which they came.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from service.gateway.api_errors import APIError, unavailable
from service.registry.models import ModelSpec

State = Literal["cold", "waking", "ready", "not_deployed"]
OnWake = Callable[[str, bool], None]  # takes a model's key and whether its pool is ready
FAILED_FOR_S = 5.0  # a request this soon after a failed wake gets that failure again: each wake costs a boot


def ignore_wake(_key: str, _is_ready: bool) -> None:
    """Do nothing after a wake."""


class WakeError(Exception):
    """The pool did not wake; the message says why, and holds no secret."""


@dataclass(frozen=True)
class Endpoint:
    """Where a ready pool takes requests.

    Attributes:
        url: Scheme, host and port, without a slash at the end.
        query: Added to every request.
        headers: Added to every request, such as the pool's own key.
        forwards_client_key: The client's own key is sent too: the engine checks it again.
    """

    url: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    forwards_client_key: bool = False


class Pool(ABC):
    """The replicas of one model.

    Args:
        spec: The model.
        location: Where it runs, for people: `H100`, `this machine`.
        dollars_per_hour: Price of one replica; None: it has none.
        on_wake: Called after each wake.
    """

    def __init__(
        self, spec: ModelSpec, location: str, dollars_per_hour: float | None = None, on_wake: OnWake = ignore_wake
    ) -> None:
        self.spec, self.location, self.dollars_per_hour, self._on_wake = spec, location, dollars_per_hour, on_wake
        self.in_use = 0
        self.used_at = time.monotonic()
        self.answering = 0
        self.answered_at: float | None = None
        self.wake_s: float | None = None  # how long the last wake took
        self._waking: asyncio.Task[Endpoint] | None = None
        self._woken_at = 0.0
        self._failure: tuple[float, str] | None = None

    @property
    def state(self) -> State:
        """What is known without a request to Modal or an engine."""
        if self._waking:
            return "waking"
        return "cold" if self.endpoint() is None else "ready"

    @property
    def waking_s(self) -> float:
        """How long the running wake has taken so far."""
        return time.monotonic() - self._woken_at if self._waking else 0.0

    @abstractmethod
    def endpoint(self) -> Endpoint | None:
        """Return where it takes requests; None unless it is known to be ready."""

    @abstractmethod
    async def wake(self) -> Endpoint:
        """Make it ready, however long that takes.

        Raises:
            WakeError: It will not become ready.
            APIError: It cannot be woken.
        """

    def check(self, name: str) -> None:  # noqa: B027 - most pools serve every name
        """Refuse a model that can never be served here, before anything wakes.

        Args:
            name: The requested model or adapter, without a GPU.

        Raises:
            APIError: 400; a retry cannot help.
        """

    def mark_unreachable(self) -> None:  # noqa: B027 - a pool that learns of its end in another way needs nothing here
        """Record that a request could not reach it: the next request checks whether it is there."""

    async def probe(self) -> State:
        """Find out its state and return it; wakes nothing."""
        return self.state

    @contextmanager
    def track_request(self, *, keep_alive: bool = True) -> Iterator[None]:
        """Count a request, from before the wake to the end of its answer; `keep_alive` restarts the idle timeout."""
        self.in_use += 1
        try:
            yield
        finally:
            self.in_use -= 1
            if keep_alive:
                self.used_at = time.monotonic()

    @contextmanager
    def track_response(self) -> Iterator[None]:
        """Record that it is answering, while the context lasts."""
        self.answering += 1
        self.answered_at = time.monotonic()
        try:
            yield
        finally:
            self.answering -= 1
            self.answered_at = time.monotonic()

    async def ready(self) -> Endpoint:
        """Return where it takes requests, at once or after the one wake that all requests wait for.

        Cancelling this call does not cancel the wake.

        Raises:
            APIError: 503, with the reason why it did not wake.
        """
        if endpoint := self.endpoint():
            return endpoint
        waking = self._waking or self._start_wake()
        try:
            return await asyncio.shield(waking)
        except WakeError as error:
            raise self._api_error(str(error)) from error
        except asyncio.CancelledError:
            if not waking.cancelled():  # the client left
                raise
            raise self._api_error("The service is shutting down.") from None

    @property
    def retry_after_s(self) -> int:
        """When a retry makes sense: what is left of a wake as long as the last one, 1 to 30 s."""
        left = (self.wake_s or 30.0) - self.waking_s
        return round(min(max(left, 1.0), 30.0))

    def _start_wake(self) -> asyncio.Task[Endpoint]:
        self._check_failure()
        self._woken_at = time.monotonic()
        self._waking = asyncio.create_task(self.wake(), name=f"wake {self.spec.key}")
        self._waking.add_done_callback(self._on_wake_end)
        return self._waking

    def _on_wake_end(self, task: asyncio.Task[Endpoint]) -> None:
        self._waking = None
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self.wake_s = time.monotonic() - self._woken_at
        elif isinstance(error, WakeError):
            self._failure = (time.monotonic(), str(error))
        self._on_wake(self.spec.key, error is None)

    def _check_failure(self) -> None:
        if self._failure and time.monotonic() - self._failure[0] < FAILED_FOR_S:
            raise self._api_error(self._failure[1])
        self._failure = None

    def _api_error(self, reason: str) -> APIError:
        sentence = f"Model '{self.spec.key}' on {self.location} did not start. {reason}"
        return unavailable(sentence, "model_failed", FAILED_FOR_S)

    async def close(self) -> None:
        """Cancel the running wake."""
        if self._waking:
            self._waking.cancel()
            await asyncio.gather(self._waking, return_exceptions=True)
