"""Starts, evicts and stops the engines of this machine. `eviction` decides; this carries out."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from service.boots.records import BootRecord
from service.errors import EngineError
from service.gateway.eviction import RunningEngine, eviction_for
from service.gateway.local_pool import EngineHandle, LocalPool
from service.gateway.pool import OnWake, ignore_wake
from service.gateway.threads import in_thread
from service.registry.gpus import Gpu
from service.registry.models import ModelSpec, Registry

_FORGET_S = 3600.0
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
        check: Raises a ServiceError for a model that can never be served here; blocks for a moment.
        max_model_len: Returns the context that a model's engine would have here; None: not known yet.
        lacks_tool_parser: Tells whether a model's engine is certain to have no tool parser.
        boots: Returns the records of this machine's boots; blocks.
        adapters: Checks a model's adapters, and returns the directories of those that are here; with True it fetches
            the others before. Raises a ServiceError for one that its engine could not serve; blocks.
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
        check: Callable[[ModelSpec], None] = lambda _: None,
        max_model_len: Callable[[ModelSpec], int | None] = lambda spec: spec.max_model_len,
        lacks_tool_parser: Callable[[ModelSpec], bool] = lambda _: False,
        boots: Callable[[], list[BootRecord]] = list,
        adapters: Callable[[ModelSpec, bool], Mapping[str, Path]] = lambda _spec, _fetch: {},
    ) -> None:
        self.boots, self.adapters = boots, adapters
        self.fetch, self.make, self.on_wake = fetch, make, on_wake
        self.check, self.max_model_len, self.lacks_tool_parser = check, max_model_len, lacks_tool_parser
        self._free_memory, self._needs_memory = free_memory, needs_memory
        self._gpus, self._n_gpu, self._idle_s = gpus, n_gpu, idle_s
        self._pools: dict[str, LocalPool] = {}
        self._replaced: list[LocalPool] = []  # whose entries a reload has changed: they finish what they have
        self.starting = asyncio.Lock()  # one engine at a time: each takes the memory that was free when it was chosen
        self._idle_timeout: asyncio.Task[None] | None = None
        self.room_changed = asyncio.Event()
        self.stopping: set[EngineHandle] = set()
        self.closed = False

    def pool(self, spec: ModelSpec, gpu: Gpu | None = None) -> LocalPool:
        """Return the pool of a model; it uses this machine's GPUs, whatever GPU the request names."""
        del gpu
        if (pool := self._pools.get(spec.key)) and pool.spec == spec:
            return pool
        if pool:
            self._replaced.append(pool)
        pool = self._pools[spec.key] = LocalPool(spec, self)
        return pool

    async def prepare(self, registry: Registry, fetched: str | None = None) -> None:
        """Load the adapters that entries of running engines have got, and check those of all others.

        Args:
            registry: What `replace` gets if this succeeds, and else the registry before.
            fetched: Key of the model whose adapters are fetched, whether or not it has an engine.

        Raises:
            ServiceError: An adapter cannot be fetched, or is refused. The engines serve on.
        """
        for key, spec in registry.specs.items():
            pool = self._pools.get(key)
            if not spec.adapters or (pool and pool.spec == spec):
                continue
            if pool and pool.engine and pool.can_follow(spec):
                await pool.add_adapters(spec)
            else:
                await in_thread(partial(self.adapters, spec, key == fetched))

    def replace(self, registry: Registry) -> None:
        """Serve other models: let the engines end, once they are idle, whose entries are gone or have changed.

        Where only adapters have changed and an engine has room for them, it goes on with them.
        """
        for key, pool in [*self._pools.items()]:
            spec = registry.specs.get(key)
            if spec and pool.can_follow(spec):
                pool.follow(spec)
            elif spec != pool.spec:
                self._replaced.append(self._pools.pop(key))

    @property
    def live(self) -> list[LocalPool]:
        """The pools that have an engine, least recently used first."""
        return sorted((pool for pool in self._all() if pool.engine), key=lambda pool: pool.used_at)

    def _all(self) -> list[LocalPool]:
        recent = time.monotonic() - _FORGET_S  # a request may still be about to use it
        self._replaced = [pool for pool in self._replaced if pool.engine or pool.in_use or pool.used_at > recent]
        return [*self._pools.values(), *self._replaced]

    async def evict_for(self, pool: LocalPool) -> tuple[int, ...] | None:
        """Stop idle engines until a pool's engine fits, and return its GPUs; None: engines in use are in the way."""
        promised = 0
        while True:
            others = [other for other in self.live if other is not pool]
            names = {f"{other.spec.key} {number}": other for number, other in enumerate(others)}
            running = [RunningEngine(name, self._held_by(other), not other.in_use) for name, other in names.items()]
            needed, free = self._needed_by(pool), self._free_beside(others)
            evicted = eviction_for(needed, free, running)
            if evicted is None and promised:  # the system may report less memory than the stopped engines were to free
                evicted = eviction_for(needed, promised, running)
            if evicted is None:
                return None
            if not evicted:
                return tuple(self._free_gpus(others)[: self._n_gpu(pool.spec)])
            other = names[evicted[0]]
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
                idle_s = pool.idle_s
                if not pool.in_use and (idle_s >= self._idle_s or (pool in self._replaced and idle_s)):
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
        pools = self._all()
        await asyncio.gather(*(pool.close() for pool in pools), *(pool.stop(grace_s) for pool in pools))

    def kill(self) -> None:
        """End at once the engines that `close` is waiting for."""
        for engine in self.stopping:
            threading.Thread(target=engine.stop, args=(0,), name="gateway-kill", daemon=True).start()
