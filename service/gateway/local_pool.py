"""Pools on this machine: an engine starts with its model's first request, and ends when idle or evicted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import aiohttp

from service.errors import EngineError
from service.gateway.pool import Endpoint, Pool, WakeError
from service.gateway.threads import in_thread
from service.keys import digest
from service.ports import free_port
from service.registry.models import ModelSpec

if TYPE_CHECKING:
    from service.gateway.local_scheduler import LocalScheduler

LOCATION = "this machine"
_POLL_S = 0.05
_RECHECK_S = 1.0  # memory that other programs free is not reported
_ANSWER_S, _DEATH_REPORT_S = 5.0, 1.0  # the second: until an engine's death is reported, with its reason
_log = logging.getLogger(__name__)


class EngineHandle(Protocol):
    """What a pool needs of a `service.replica.lifecycle.Replica`. All methods block."""

    def prepare(self) -> None:
        """Fetch the weights."""

    def start(self, digests: Mapping[str, str]) -> None:
        """Make the engine ready."""

    def stop(self, grace_s: float | None = None) -> None:
        """End it, whatever state it is in."""


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

    @property
    def idle_s(self) -> float:
        """How long it has had no request; 0 while it starts."""
        return time.monotonic() - self.used_at if not self.in_use and self.state != "waking" else 0.0

    @contextmanager
    def track_request(self, *, keep_alive: bool = True) -> Iterator[None]:
        """Count a request, and report it when the engine is idle afterwards."""
        try:
            with super().track_request(keep_alive=keep_alive):
                yield
        finally:
            if not self.in_use:
                self._scheduler.notify_room()

    def endpoint(self) -> Endpoint | None:
        """Return where its engine listens."""
        return self._endpoint

    def mark_unreachable(self) -> None:
        """Have the next request check whether the engine still answers; its death may be reported a moment later."""
        self._endpoint = None

    def attach(self, engine: EngineHandle, port: int, key: str, gpus: tuple[int, ...] = ()) -> None:
        """Take an engine that is ready already."""
        self.engine, self.gpus = engine, gpus
        self._mark_ready(_endpoint(port, key))

    async def wake(self) -> Endpoint:
        """Fetch the weights, evict other engines if necessary, and start the engine."""
        await self._stopped.wait()
        if self._scheduler.closed:
            raise WakeError("The service is shutting down.")
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
                    await asyncio.wait_for(changed.wait(), _RECHECK_S)
        except Exception as error:
            self.engine = None
            self._scheduler.notify_room()
            _log.warning("%s did not start: %s", self.spec.key, error)
            raise WakeError(str(error) or type(error).__name__) from error

    async def _start(self, gpus: tuple[int, ...]) -> Endpoint:
        self.gpus, port, key = gpus, free_port(), new_key()
        loop = asyncio.get_running_loop()

        def died(error: EngineError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._on_death, engine, error)

        engine = await in_thread(lambda: self._scheduler.make(self.spec, port, gpus, died))
        self.engine = engine
        await in_thread(engine.prepare)
        await in_thread(lambda: engine.start({digest(key.encode()): "gateway"}))
        return _endpoint(port, key)

    def _mark_ready(self, endpoint: Endpoint) -> Endpoint:
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
            _log.warning("The engine of %s does not answer; another one is started.", self.spec.key)
            await in_thread(lambda: engine.stop(0))
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
    """Tell whether an engine answers there, or is only slow; false where the connection is refused or breaks off."""
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(_ANSWER_S)) as http,
            http.get(f"{endpoint.url}/health"),
        ):
            return True
    except TimeoutError:
        return True
    except (aiohttp.ClientError, OSError):
        await asyncio.sleep(_DEATH_REPORT_S)
        return False


def _endpoint(port: int, key: str) -> Endpoint:
    return Endpoint(f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {key}"})
