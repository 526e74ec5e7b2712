"""Starts, evicts and stops the engines of this machine. `eviction` decides; this carries out."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

from service.errors import EngineError
from service.gateway.eviction import RunningEngine, eviction_for
from service.gateway.local_pool import EngineHandle, LocalPool
from service.gateway.pool import OnWake, ignore_wake
from service.registry.gpus import Gpu
from service.registry.models import ModelSpec

_log = logging.getLogger(__name__)

Make = Callable[[ModelSpec, int, tuple[int, ...], Callable[[EngineError], None]], EngineHandle]


class LocalScheduler:
    """The engines of this machine.

    Args:
        fetch: Fetches a model's weights where they are not here yet; blocks.
        make: Returns an engine for a model, a port, GPUs, and a callback for its death; blocks.
        free_memory: Returns bytes that may be used.
        needs_memory: Returns bytes that a model's engine takes.
        gpus: Numbers of the GPUs; none: engines run on the processor.
        n_gpu: Returns how many of them a model takes.
        idle_s: The idle timeout of an engine.
        on_wake: Called after each wake of a pool.
    """

    def __init__(
        self,
        fetch: Callable[[ModelSpec], object],
        make: Make,
        *,
        free_memory: Callable[[], int],
        needs_memory: Callable[[ModelSpec], int],
        gpus: tuple[int, ...] = (),
        n_gpu: Callable[[ModelSpec], int] = lambda _: 1,
        idle_s: float = 900.0,
        on_wake: OnWake = ignore_wake,
    ) -> None:
        self.fetch, self.make, self.on_wake = fetch, make, on_wake
        self._free_memory, self._needs_memory = free_memory, needs_memory
        self._gpus, self._n_gpu, self._idle_s = gpus, n_gpu, idle_s
        self._pools: dict[str, LocalPool] = {}
        self.starting = asyncio.Lock()  # one engine at a time: each takes the memory that was free when it was chosen
        self._idle_timeout: asyncio.Task[None] | None = None
        self.room_changed = asyncio.Event()
        self.stopping: set[EngineHandle] = set()
        self.closed = False

    def pool(self, spec: ModelSpec, gpu: Gpu | None = None) -> LocalPool:
        """Return the pool of a model; it uses this machine's GPUs, whatever GPU the request names."""
        del gpu
        if (pool := self._pools.get(spec.key)) is None:
            pool = self._pools[spec.key] = LocalPool(spec, self)
        return pool

    @property
    def live(self) -> list[LocalPool]:
        """The pools that have an engine, least recently used first."""
        return sorted((pool for pool in self._pools.values() if pool.engine), key=lambda pool: pool.used_at)

    async def evict_for(self, pool: LocalPool) -> tuple[int, ...] | None:
        """Stop idle engines until a pool's engine fits, and return its GPUs; None: engines in use are in the way."""
        promised = 0
        while True:
            others = [other for other in self.live if other is not pool]
            running = [RunningEngine(other.spec.key, self._held_by(other), not other.in_use) for other in others]
            needed, free = self._needed_by(pool), self._free_beside(others)
            evicted = eviction_for(needed, free, running)
            if evicted is None and promised:  # the system may report less memory than the stopped engines were to free
                evicted = eviction_for(needed, promised, running)
            if evicted is None:
                return None
            if not evicted:
                return tuple(self._free_gpus(others)[: self._n_gpu(pool.spec)])
            other = self._pools[evicted[0]]
            promised = max(promised, free) + self._held_by(other)
            _log.info("%s is stopped to make room for %s.", other.spec.key, pool.spec.key)
            await other.stop()

    def _needed_by(self, pool: LocalPool) -> int:
        return self._n_gpu(pool.spec) if self._gpus else self._needs_memory(pool.spec)

    def _held_by(self, pool: LocalPool) -> int:
        return len(pool.gpus) if self._gpus else self._needs_memory(pool.spec)

    def _free_beside(self, others: list[LocalPool]) -> int:
        return len(self._free_gpus(others)) if self._gpus else self._free_memory()

    def _free_gpus(self, others: list[LocalPool]) -> list[int]:
        taken = {gpu for other in others for gpu in other.gpus}
        return [gpu for gpu in self._gpus if gpu not in taken]

    def notify_room(self) -> None:
        """Let the pools that wait for room look again: an engine has ended or is idle now."""
        self.room_changed.set()
        self.room_changed = asyncio.Event()

    def begin(self) -> None:
        """Begin to stop engines at their idle timeout; needs a running loop."""
        self._idle_timeout = asyncio.create_task(self._stop_idle_engines(), name="stop idle engines")

    async def _stop_idle_engines(self) -> None:
        while True:
            for pool in self.live:
                if not pool.in_use and (idle_s := pool.idle_s) >= self._idle_s:
                    _log.info(
                        "%s is stopped after %.0f s without a request; the next one wakes it.", pool.spec.key, idle_s
                    )
                    await pool.stop()
            await asyncio.sleep(min(1.0, self._idle_s / 4))

    async def close(self, grace_s: float | None = None) -> None:
        """End all engines, ready, starting or stopping, with the same grace period; no engine starts any more."""
        self.closed = True
        if self._idle_timeout:
            self._idle_timeout.cancel()
        stops = [pool.stop(grace_s) for pool in self._pools.values()]
        await asyncio.gather(*(pool.close() for pool in self._pools.values()), *stops)

    def kill(self) -> None:
        """End at once the engines that `close` is waiting for."""
        for engine in self.stopping:
            threading.Thread(target=engine.stop, args=(0,), name="gateway-kill", daemon=True).start()
