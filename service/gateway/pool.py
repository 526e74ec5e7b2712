"""A pool: the replicas of one model behind one address, which can be asleep and be woken. What all kinds share.

Many clients of a cold pool cause one wake, and go on in the order in which they came.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from service.gateway.api_errors import Refusal, unavailable
from service.registry.models import ModelSpec

State = Literal["cold", "waking", "ready", "not_deployed"]
OnWake = Callable[[str, bool], None]  # takes a model's key and whether its pool is ready
FAILED_FOR_S = 5.0  # whoever retries at once after a failed wake is told of that one: each costs a boot


def ignore_wake(_key: str, _is_ready: bool) -> None:
    """Do nothing after a wake."""


class WakeError(Exception):
    """The pool did not wake; the sentence says why, and holds no secret."""


@dataclass(frozen=True)
class Address:
    """Where a ready pool takes requests.

    Attributes:
        url: Scheme, host and port, without a slash at the end.
        query: Added to every request.
        headers: Added to every request, such as the pool's own key.
        passes_key: The client's own key goes along: the engine checks it again.
    """

    url: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    passes_key: bool = False


class Pool(ABC):
    """The replicas of one model.

    Args:
        spec: The model.
        place: Where it runs, for people: `H100`, `this machine`.
        dollars_per_hour: Price of one replica; None: it has none.
        on_wake: Called after each wake.
    """

    def __init__(
        self, spec: ModelSpec, place: str, dollars_per_hour: float | None = None, on_wake: OnWake = ignore_wake
    ) -> None:
        self.spec, self.place, self.dollars_per_hour, self._on_wake = spec, place, dollars_per_hour, on_wake
        self.in_use = 0
        self.used_at = time.monotonic()
        self.answering = 0
        self.answered_at: float | None = None
        self.wake_s: float | None = None  # what the last one took
        self._waking: asyncio.Task[Address] | None = None
        self._woken_at = 0.0
        self._failure: tuple[float, str] | None = None

    @property
    def state(self) -> State:
        """What is known of it without asking anybody."""
        if self._waking:
            return "waking"
        return "cold" if self.address() is None else "ready"

    @property
    def waking_s(self) -> float:
        """How long the wake under way has taken so far."""
        return time.monotonic() - self._woken_at if self._waking else 0.0

    @abstractmethod
    def address(self) -> Address | None:
        """Return where it takes requests; None when it is not known to be ready."""

    @abstractmethod
    async def wake(self) -> Address:
        """Bring it to readiness, however long that takes.

        Raises:
            WakeError: It will not become ready.
            Refusal: It cannot be asked to.
        """

    def check(self, name: str) -> None:  # noqa: B027 - most pools take whatever reaches them
        """Refuse what can never be served here, before anything wakes.

        Args:
            name: The model or adapter that is asked for, without a GPU.

        Raises:
            Refusal: 400; asking again is in vain.
        """

    def lost(self) -> None:  # noqa: B027 - a pool that learns of its end otherwise needs none
        """Take note that it did not answer: the next request finds out whether it is there."""

    async def observe(self) -> State:
        """Return its state, asking whoever knows; wakes nothing."""
        return self.state

    @contextmanager
    def use(self, *, looks: bool = False) -> Iterator[None]:
        """Count a request, from before the wake to the end of its answer; one that only `looks` keeps nothing awake."""
        self.in_use += 1
        try:
            yield
        finally:
            self.in_use -= 1
            if not looks:
                self.used_at = time.monotonic()

    @contextmanager
    def answers(self) -> Iterator[None]:
        """Take note that it answers, for as long as that lasts."""
        self.answering += 1
        self.answered_at = time.monotonic()
        try:
            yield
        finally:
            self.answering -= 1
            self.answered_at = time.monotonic()

    async def ready(self) -> Address:
        """Return where it takes requests, once it does: at once, or after the one wake that all wait for.

        Cancelling this leaves the wake to the others.

        Raises:
            Refusal: 503, with the reason why it did not wake.
        """
        if address := self.address():
            return address
        waking = self._waking or self._begin()
        try:
            return await asyncio.shield(waking)
        except WakeError as error:
            raise self._refusal(str(error)) from error
        except asyncio.CancelledError:
            if not waking.cancelled():  # it is the client that left
                raise
            raise self._refusal("The service is being stopped.") from None

    @property
    def retry_after_s(self) -> int:
        """When it is worth asking again: what is left of a wake as long as the last one, 1 to 30 s."""
        left = (self.wake_s or 30.0) - self.waking_s
        return round(min(max(left, 1.0), 30.0))

    def _begin(self) -> asyncio.Task[Address]:
        self._check_failure()
        self._woken_at = time.monotonic()
        self._waking = asyncio.create_task(self.wake(), name=f"wake {self.spec.key}")
        self._waking.add_done_callback(self._ended)
        return self._waking

    def _ended(self, task: asyncio.Task[Address]) -> None:
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
            raise self._refusal(self._failure[1])
        self._failure = None

    def _refusal(self, reason: str) -> Refusal:
        sentence = f"Model '{self.spec.key}' on {self.place} did not start. {reason}"
        return unavailable(sentence, "model_failed", FAILED_FOR_S)

    async def close(self) -> None:
        """Wake nothing any more; a wake under way is given up."""
        if self._waking:
            self._waking.cancel()
            await asyncio.gather(self._waking, return_exceptions=True)
