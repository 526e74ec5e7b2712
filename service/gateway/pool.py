"""A pool: the replicas of one model behind one endpoint, which may be cold and can be woken. What all kinds share.

Many requests for a cold pool cause one wake, and continue in the order in which they came.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from service.boots.groups import usual_seconds
from service.boots.records import BootRecord, Span
from service.engine import parsers
from service.errors import ComputeCapabilityError, ServiceError
from service.gateway.call_rate import CallRate
from service.gateway.http_client.connections import Origin
from service.gateway.http_client.head import header_lines, query_string
from service.in_engine.vllm_service.api_error import APIError
from service.registry.models import ModelSpec

State = Literal["cold", "waking", "ready", "not_deployed", "does_not_fit"]
OnWake = Callable[[str, bool], None]  # takes a model's key and whether its pool is ready
_log = logging.getLogger(__name__)
FAILED_FOR_S = 5.0  # a request this soon after a failed wake gets that failure again: each wake costs a boot
_LONGEST_S, _LONGEST_TRANSIENT_S = 300.0, 30.0  # to which that time doubles with each wake in a row that fails


def ignore_wake(_key: str, _is_ready: bool) -> None:
    """Do nothing after a wake."""


class WakeError(Exception):
    """The pool did not wake; the message says why, and holds no secret.

    Args:
        message: Why.
        is_transient: The next wake may succeed, without anybody's doing.
        lasts_s: How long requests get this failure again without a wake, where that is known; None: longer with each
            wake in a row that fails.
    """

    def __init__(self, message: str, *, is_transient: bool = False, lasts_s: float | None = None) -> None:
        super().__init__(message)
        self.is_transient, self.lasts_s = is_transient, lasts_s


def shutting_down() -> APIError:
    """Return the error of a request while the service ends; a client that comes back finds the next one."""
    message = "The service is shutting down. Send the request again once it has started."
    return APIError(503, message, code="shutting_down", retry_after_s=FAILED_FOR_S)


@dataclass(frozen=True)
class Endpoint:
    """Where a ready pool takes requests.

    Attributes:
        url: Scheme, host and port, without a slash at the end.
        query: Added to every request.
        headers: Added to every request, such as the pool's own key.
        forwards_client_key: The client's own key is sent too: the engine checks it again.
        own_calls: Requests pass Modal's proxy, and this is the rate of the gateway's own; None: the engine is reached
            directly.
        answer_s: How long Modal may take for an answer.
    """

    url: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    forwards_client_key: bool = False
    own_calls: CallRate | None = None
    answer_s: float = 3600.0

    @cached_property
    def origin(self) -> Origin:
        """Where its connections lead."""
        return Origin.of(self.url)

    @cached_property
    def query_string(self) -> str:
        """The query, with escapes."""
        return query_string(self.query)

    @cached_property
    def header_lines(self) -> bytes:
        """`Host` and the headers, each with the end of its line."""
        return header_lines({"Host": self.origin.authority, **self.headers})

    def with_path(self, path: str) -> str:
        """Return the URL of a path, with the query."""
        return f"{self.url}{path}" + (f"?{self.query_string}" if self.query else "")


def unfit(error: ServiceError) -> APIError:
    """Return the error of a model that can never be served here."""
    code = "gpu_not_supported" if isinstance(error, ComputeCapabilityError) else "model_too_large"
    return APIError(400, str(error), code=code, param="model")


class Tracked(AbstractContextManager[None]):
    """What is counted while a context lasts; each request has two, and one of contextlib's takes twice as long."""

    __slots__ = ("_begin", "_end")

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._begin, self._end = begin, end

    def __enter__(self) -> None:
        self._begin()

    def __exit__(self, *_: object) -> None:
        self._end()


class Pool(ABC):
    """The replicas of one model.

    Args:
        spec: The model.
        location: Where it runs, for people: `H100`, `this machine`.
        dollars_per_hour: List price of one replica; None: it has none.
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
        self._recorded_s: float | None = None  # how long boots take, by their records
        self._reading: asyncio.Task[None] | None = None
        self.served_max_model_len: int | None = None  # the context of the last engine that was ready
        self._waking: asyncio.Task[Endpoint] | None = None
        self._woken_at = 0.0
        self.woken_phases: tuple[Span, ...] = ()  # of the last wake, in CLOCK_MONOTONIC, where they could be seen
        self._failure: WakeError | None = None
        self._failed_until = self._back_off_s = 0.0

    @property
    def state(self) -> State:
        """What is known without a request to Modal or an engine."""
        if self._waking:
            return "waking"
        return "cold" if self.endpoint() is None else "ready"

    @property
    def current_price(self) -> float | None:
        """What a replica costs in an hour now; None: it has no price."""
        return self.dollars_per_hour

    @property
    def is_full(self) -> bool:
        """Whether all the replicas that it may have are busy."""
        return False

    @property
    def lacks_tool_parser(self) -> bool:
        """Whether its engine is certain to have no tool parser."""
        return parsers.lacks_tool_parser(self.spec, None)

    @property
    def max_model_len(self) -> int | None:
        """The context of its engine; before one was ready, the one that it would have. None: not known yet."""
        return self.served_max_model_len or self._planned_max_model_len()

    def _planned_max_model_len(self) -> int | None:
        return self.spec.max_model_len

    @property
    def waking_s(self) -> float:
        """How long the running wake has taken so far."""
        return time.monotonic() - self._woken_at if self._waking else 0.0

    @abstractmethod
    def endpoint(self) -> Endpoint | None:
        """Return where it takes requests; None unless it is known to be ready."""

    @property
    def may_be_read(self) -> bool:
        """Whether a request for its engine's figures costs nothing: one behind Modal keeps an idle replica up."""
        endpoint = self.endpoint()
        return endpoint is None or endpoint.own_calls is None or self.answering > 0

    @abstractmethod
    async def wake(self) -> Endpoint:
        """Make it ready, however long that takes.

        Raises:
            WakeError: It will not become ready.
            APIError: It cannot be woken.
        """

    def check(self, name: str) -> None:
        """Refuse a model that can never be served here, before anything wakes.

        Args:
            name: The requested model or adapter, without a GPU.

        Raises:
            APIError: 400; a retry cannot help.
        """
        if error := self.why_unfit(name):
            raise error

    @abstractmethod
    def why_unfit(self, name: str) -> APIError | None:
        """Return the error of a model that can never be served here; None: it can, or nobody knows yet."""

    def check_spending(self) -> None:  # noqa: B027 - engines of this machine cost nothing
        """Refuse a request while the service may cost no more, whether or not this pool is ready.

        Raises:
            APIError: 503.
        """

    def mark_unreachable(self) -> None:  # noqa: B027 - a pool that learns of its end in another way needs nothing here
        """Record that a request could not reach it: the next request checks whether it is there."""

    async def probe(self) -> State:
        """Find out its state and return it; wakes nothing."""
        return self.state

    def track_request(self, *, keep_alive: bool = True) -> AbstractContextManager[None]:
        """Count a request, from before the wake to the end of its answer; `keep_alive` restarts the idle timeout."""
        return Tracked(self._begin_request, self._end_request if keep_alive else self._uncount_request)

    def _begin_request(self) -> None:
        self.in_use += 1

    def _end_request(self) -> None:
        self.used_at = time.monotonic()
        self._uncount_request()

    def _uncount_request(self) -> None:
        self.in_use -= 1

    def track_response(self) -> AbstractContextManager[None]:
        """Record that it is answering, while the context lasts."""
        return Tracked(self._begin_response, self._end_response)

    def _begin_response(self) -> None:
        self.answering += 1
        self.answered_at = time.monotonic()

    def _end_response(self) -> None:
        self.answering -= 1
        self.answered_at = time.monotonic()

    async def ready(self) -> Endpoint:
        """Return where it takes requests, at once or after the one wake that all requests wait for.

        Cancelling this call does not cancel the wake.

        Raises:
            APIError: 503, with the reason why it did not wake, and when the next wake may begin.
        """
        self.check_spending()
        if endpoint := self.endpoint():
            return endpoint
        if not self._waking:
            await self._check_failure()
        waking = self._waking or self._start_wake()
        try:
            return await asyncio.shield(waking)
        except WakeError as error:
            raise self._api_error(error) from error
        except asyncio.CancelledError:
            if not waking.cancelled():  # the client left
                raise
            raise shutting_down() from None

    @property
    def left_s(self) -> float | None:
        """What is left of a wake as long as the last one, or as recorded boots; None: neither tells."""
        return max(0.0, self.usual_s - self.waking_s) if self.usual_s else None

    @property
    def usual_s(self) -> float | None:
        """How long a wake takes: as the last one did, or as recorded boots; None: neither tells."""
        return self.wake_s or self._recorded_s

    @property
    def failure(self) -> str | None:
        """Why the last wake failed; None: it did not, or another one runs."""
        return str(self._failure) if self._failure and self.state == "cold" else None

    def forget_failure(self) -> None:
        """Have the next request wake it at once: what failed before may have been mended."""
        self._failure, self._back_off_s = None, 0.0

    @property
    def retry_after_s(self) -> int:
        """When a retry makes sense: what is left of the wake, 1 to 30 s."""
        left_s = self.left_s
        return round(min(max(30.0 if left_s is None else left_s, 1.0), 30.0))

    async def recorded_s(self) -> float | None:
        """Return how long boots take, by their records; None: there are none."""
        return usual_seconds(await self.boots(), self.spec.key, lambda _: True)

    async def boots(self) -> list[BootRecord]:
        """Return the records of its replicas' boots that are known here, oldest first."""
        return []

    @property
    def wake_phases(self) -> tuple[Span, ...]:
        """The phases of the running wake that have ended, where they can be seen from here."""
        return ()

    @abstractmethod
    async def stop(self) -> None:
        """End its replicas, once the requests that run have ended or their grace period has."""

    async def _read_records(self) -> None:
        try:
            self._recorded_s = await self.recorded_s()
        except Exception as error:  # noqa: BLE001 - a figure in a comment, of which no wake may fail
            _log.warning("The records of the boots of '%s' cannot be read: %s", self.spec.key, error)

    def _start_wake(self) -> asyncio.Task[Endpoint]:
        self._failure = None
        self._woken_at = time.monotonic()
        self._waking = asyncio.create_task(self.wake(), name=f"wake {self.spec.key}")
        self._waking.add_done_callback(self._on_wake_end)
        if self.wake_s is None and self._reading is None:
            self._reading = asyncio.create_task(self._read_records(), name=f"records of {self.spec.key}")
        return self._waking

    def _on_wake_end(self, task: asyncio.Task[Endpoint]) -> None:
        self.woken_phases = tuple(
            Span(phase.name, self._woken_at + phase.start, self._woken_at + phase.end) for phase in self.wake_phases
        )
        self._waking = None
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self.wake_s = time.monotonic() - self._woken_at
            self.forget_failure()
        elif isinstance(error, WakeError):
            self._remember(error)
        elif isinstance(error, APIError) and error.status == 503:  # refused before it began
            return
        self._on_wake(self.spec.key, error is None)

    def _remember(self, error: WakeError) -> None:
        """Have requests get a failure again for a while, and longer with each wake in a row that fails."""
        lasts_s = error.lasts_s
        if lasts_s is None:
            longest_s = _LONGEST_TRANSIENT_S if error.is_transient else _LONGEST_S
            lasts_s = self._back_off_s = min(max(FAILED_FOR_S, 2 * self._back_off_s), longest_s)
        self._failure, self._failed_until = error, time.monotonic() + lasts_s

    async def _check_failure(self) -> None:
        """Give a request the last wake's failure again, unless its time is over or a deploy may have mended it."""
        failure = self._failure
        if failure is None or time.monotonic() >= self._failed_until:
            return
        if not await self._is_deployed_anew():
            raise self._api_error(failure)
        self.forget_failure()

    async def _is_deployed_anew(self) -> bool:
        """Tell whether it was deployed after the last wake began."""
        return False

    def _api_error(self, error: WakeError) -> APIError:
        """Return the answer to a request; it has the time of the next wake, unless a wake is known not to help.

        A client that repeats requests for long, such as a batch, waits for that time; OpenAI's and Anthropic's clients
        repeat them at once, and do so only where the next wake may succeed without anybody's doing.
        """
        failed = f"Model '{self.spec.key}' on {self.location} did not start"
        if error.lasts_s is not None:
            return APIError(503, f"{failed}. {error}", code="model_failed")
        left_s = max(1, math.ceil(self._failed_until - time.monotonic()))
        return APIError(
            503,
            f"{failed}; a request in {left_s} s tries again. {error}",
            code="model_failed",
            retry_after_s=left_s if error.is_transient else None,
            headers={"Retry-After": str(left_s)},
        )

    async def close(self) -> None:
        """Cancel the running wake."""
        running = [task for task in (self._waking, self._reading) if task]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
