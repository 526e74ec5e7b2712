"""Pools on this machine: an engine starts with its model's first request, and ends when idle or evicted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from service.boots.failures import EXPIRY_S, is_permanent
from service.boots.phases import Phases
from service.boots.records import BootRecord, Span
from service.errors import EngineError, GpuCountError, MemoryTooSmallError, ServiceError, UsageError
from service.gateway.engine_adapters import EngineAdapters, LoadsAdapters, without_adapters
from service.gateway.pool import Endpoint, Pool, Tracked, WakeError, shutting_down, unfit
from service.gateway.threads import in_thread
from service.gateway.upstream import is_own_shortage, open_connections
from service.in_engine.vllm_service.api_error import APIError
from service.keys import digest
from service.ports import reserved_port
from service.registry.models import ModelSpec

if TYPE_CHECKING:
    from service.gateway.local_scheduler import LocalScheduler

LOCATION = "this machine"
_POLL_S = 0.05
_RECHECK_S = 1.0  # memory that other programs free is not reported
_ANSWER_S = 5.0
_DEATH_REPORT_S = 5.0  # from an engine's closed port to the report of its death, with the reason; vLLM takes its time
_LASTS = "The same start fails again, so none is tried for an hour; correct its entry, or restart the service."
_log = logging.getLogger(__name__)


class EngineHandle(LoadsAdapters, Protocol):
    """What a pool needs of a `service.replica.lifecycle.Replica`. All methods block.

    Attributes:
        max_model_len: The context of the engine, once it is ready.
        phases: Of its boot.
    """

    max_model_len: int | None
    phases: Phases

    def prepare(self) -> None:
        """Fetch the weights."""

    def start(self, digests: Mapping[str, str]) -> None:
        """Make the engine ready."""

    def stop(self, grace_s: float | None = None) -> None:
        """End it, whatever state it is in."""

    def kill(self) -> EngineError | None:
        """End it as one that has died, and return the cause."""


@dataclass
class _Requests:
    """How many of the requests of a period run."""

    running: int = 0


class LocalPool(Pool):
    """At most one engine, on a port and with a key of its own.

    Args:
        spec: The model.
        scheduler: Knows the other engines of this machine.

    Attributes:
        engine: Its engine, ready or starting.
        gpus: Numbers of the GPUs that the engine has.
    """

    def __init__(self, spec: ModelSpec, scheduler: LocalScheduler) -> None:
        super().__init__(spec, LOCATION, on_wake=scheduler.on_wake)
        self._scheduler = scheduler
        self.engine: EngineHandle | None = None
        self._endpoint: Endpoint | None = None
        self._last: Endpoint | None = None
        self._stopped = asyncio.Event()
        self._stopped.set()
        self.gpus: tuple[int, ...] = ()
        self._adapters: EngineAdapters | None = None
        self._requests = _Requests()  # since the last time that adapters were removed
        self._older: list[_Requests] = []

    @property
    def idle_s(self) -> float:
        """How long it has had no request; 0 while it starts."""
        return time.monotonic() - self.used_at if not self.in_use and self.state != "waking" else 0.0

    def track_request(self, *, keep_alive: bool = True) -> AbstractContextManager[None]:
        """Count a request, and report it when the engine is idle afterwards."""
        requests, end = self._requests, self._end_request if keep_alive else self._uncount_request

        def begin() -> None:
            requests.running += 1
            self._begin_request()

        def ended() -> None:
            requests.running -= 1
            end()

        return Tracked(begin, ended)

    def _uncount_request(self) -> None:
        """Count a request no more, and report it when the engine is idle afterwards."""
        super()._uncount_request()
        if not self.in_use:
            self._scheduler.notify_room()

    def _older_requests(self) -> Callable[[], bool]:
        """Return a function that tells whether a request which runs now is still running."""
        older = [requests for requests in (*self._older, self._requests) if requests.running]
        self._older, self._requests = older, _Requests()
        return lambda: any(requests.running for requests in older)

    def can_follow(self, spec: ModelSpec) -> bool:
        """Tell whether its engine, ready or starting, can serve a changed entry: only adapters have changed."""
        if self._adapters and self._adapters.engine is self.engine:
            return self._adapters.can_follow(spec)
        return self._waking is not None and without_adapters(spec) == without_adapters(self.spec)

    async def add_adapters(self, spec: ModelSpec) -> None:
        """Load the adapters that its entry is to have, before `follow`.

        Raises:
            ServiceError: One of them cannot be fetched, or is refused. The engine serves on.
        """
        if self._adapters and self._adapters.engine is self.engine:
            await self._adapters.add(spec)

    def follow(self, spec: ModelSpec) -> None:
        """Serve a changed entry from now on."""
        self.spec = spec
        if self._adapters and self._adapters.engine is self.engine:
            self._adapters.follow(spec)

    def endpoint(self) -> Endpoint | None:
        """Return where its engine listens."""
        return self._endpoint

    def why_unfit(self, name: str) -> APIError | None:
        """Return the error where this machine can never run the model's engine."""
        del name
        if self.endpoint():
            return None
        try:
            self._scheduler.check(self.spec)
        except ServiceError as error:
            return unfit(error)
        return None

    @property
    def lacks_tool_parser(self) -> bool:
        """Whether its engine is certain to have no tool parser: what runs answers for itself."""
        return self.endpoint() is None and self._scheduler.lacks_tool_parser(self.spec)

    def _planned_max_model_len(self) -> int | None:
        return self._scheduler.max_model_len(self.spec)

    async def boots(self) -> list[BootRecord]:
        """Return the boots of its model on this machine."""
        records = await in_thread(self._scheduler.boots)
        return [record for record in records if record.model == self.spec.key]

    @property
    def wake_phases(self) -> tuple[Span, ...]:
        """The phases of its engine's boot since the wake began; none while it fetches weights or waits for memory."""
        if not self._waking or not self.engine:
            return ()
        phases = self.engine.phases
        later = self.waking_s - phases.seconds  # the wake began before the engine's boot
        return tuple(Span(s.name, round(s.start + later, 3), round(s.end + later, 3)) for s in phases.spans())

    def mark_unreachable(self) -> None:
        """Have the next request check whether the engine still answers; its death may be reported a moment later."""
        self._endpoint = None

    def attach(self, engine: EngineHandle, port: int, key: str, gpus: tuple[int, ...] = ()) -> None:
        """Take an engine that is ready already."""
        self.engine, self.gpus = engine, gpus
        self._adapters = self._adapters_of(engine, self.spec)
        self._adapters.is_ready = True
        self._mark_ready(_endpoint(port, key))

    async def wake(self) -> Endpoint:
        """Fetch the weights, evict other engines if necessary, and start the engine."""
        await self._stopped.wait()
        if self._scheduler.closed:
            raise shutting_down()
        if self.engine and self._last and await self._still_serves(self.engine, self._last):
            return self._mark_ready(self._last)
        try:
            await in_thread(lambda: self._scheduler.fetch(self.spec))
            while True:
                changed = self._scheduler.room_changed  # taken before the check, so that no change is missed
                async with self._scheduler.starting:
                    gpus = await self._scheduler.evict_for(self)
                    if gpus is not None:
                        return self._mark_ready(await self._start(gpus))
                with contextlib.suppress(TimeoutError):  # outside the lock: other engines may start meanwhile
                    async with asyncio.timeout(_RECHECK_S):  # Python 3.11's `wait_for` may swallow a cancel
                        await changed.wait()
        except Exception as error:
            self.engine = None
            self._scheduler.notify_room()
            _log.warning("%s did not start: %s", self.spec.key, error)
            if isinstance(error, (UsageError, MemoryTooSmallError, GpuCountError)):
                raise unfit(error) from error
            is_transient = isinstance(error, ServiceError) and error.is_transient
            if isinstance(error, EngineError) and is_permanent(error, memory_is_its_own=False):
                raise WakeError(f"{error} {_LASTS}", lasts_s=EXPIRY_S) from error
            raise WakeError(str(error) or type(error).__name__, is_transient=is_transient) from error

    async def _start(self, gpus: tuple[int, ...]) -> Endpoint:
        self.gpus, key = gpus, new_key()
        loop = asyncio.get_running_loop()

        def died(error: EngineError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._on_death, engine, error)

        with reserved_port() as port:
            spec = self.spec
            engine = await in_thread(lambda: self._scheduler.make(spec, port, gpus, died))
            self.engine, self._adapters = engine, (adapters := self._adapters_of(engine, spec))
            adapters.follow(self.spec)
            await in_thread(engine.prepare)
            await in_thread(lambda: engine.start({digest(key.encode()): "gateway"}))
            await adapters.begin()
            return _endpoint(port, key)

    def _adapters_of(self, engine: EngineHandle, spec: ModelSpec) -> EngineAdapters:
        return EngineAdapters(
            engine, spec, lambda changed: self._scheduler.adapters(changed, True), self._older_requests
        )

    def _mark_ready(self, endpoint: Endpoint) -> Endpoint:
        self.served_max_model_len = self.engine.max_model_len if self.engine else None
        self._endpoint = self._last = endpoint
        self.used_at = time.monotonic()
        return endpoint

    async def _still_serves(self, engine: EngineHandle, endpoint: Endpoint) -> bool:
        """Tell whether an engine that could not be reached is there after all; if not, end it.

        An engine that only answers slowly is there: its watchdog finds out whether it hangs.
        """
        probe = asyncio.ensure_future(_answers(endpoint))
        while self.engine is engine and not probe.done():
            await asyncio.wait((probe,), timeout=_POLL_S)
        if self.engine is engine and await probe:
            return True
        probe.cancel()
        if self.engine is engine:
            cause = await in_thread(engine.kill)
            _log.warning("The engine of %s no longer listens; another one is started. %s", self.spec.key, cause or "")
        self.engine = None
        return False

    def _on_death(self, engine: EngineHandle, error: EngineError) -> None:
        if engine is not self.engine:
            return
        self.engine = self._endpoint = None
        self._scheduler.notify_room()
        _log.warning("The engine of %s died; the next request starts another. %s", self.spec.key, error)

    async def stop(self, grace_s: float | None = None) -> None:
        """End its engine, or wait until it has ended; a request that comes meanwhile then wakes another."""
        engine, self.engine, self._endpoint = self.engine, None, None
        if engine is None:
            await self._stopped.wait()
            return
        self._stopped.clear()
        self._scheduler.stopping.add(engine)

        def stopped(_: object) -> None:
            self._scheduler.stopping.discard(engine)
            self._stopped.set()
            self._scheduler.notify_room()

        stopping = asyncio.ensure_future(in_thread(lambda: engine.stop(grace_s)))
        stopping.add_done_callback(stopped)
        await asyncio.shield(stopping)


def new_key() -> str:
    """Return a key that only this process and one engine know: no other user of this machine reaches the engine."""
    return secrets.token_urlsafe(32)


async def _answers(endpoint: Endpoint) -> bool:
    """Tell whether an engine answers there, or is only slow; false where connections are refused or break off.

    One that has no descriptors left breaks off each connection for a while.
    """
    deadline = time.monotonic() + _DEATH_REPORT_S
    async with open_connections() as http:
        while time.monotonic() < deadline:
            try:
                async with asyncio.timeout(_ANSWER_S):
                    with closing(await http.get(endpoint.with_path("/health"), {})):
                        return True
            except TimeoutError:
                return True
            except OSError as error:
                if is_own_shortage(error):
                    return True
            await asyncio.sleep(_POLL_S)
    return False


def _endpoint(port: int, key: str) -> Endpoint:
    return Endpoint(f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {key}"})
