"""Pools on this machine: an engine starts with its model's first request, ends when idle, and makes room for others."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from service.errors import EngineError
from service.gateway.pool import Address, OnWake, Pool, WakeError, ignore_wake
from service.gateway.threads import in_thread
from service.keys import digest
from service.ports import free_port
from service.registry.gpus import Gpu
from service.registry.models import ModelSpec

PLACE = "this machine"
_POLL_S = 0.05
_ANSWERS_S, _TOLD_S = 5.0, 1.0  # the second: until its death is told, with the reason


class Engine(Protocol):
    """What a pool needs of a `service.replica.lifecycle.Replica`. All block."""

    def prepare(self) -> None:
        """Fetch the weights."""

    def start(self, digests: Mapping[str, str]) -> None:
        """Bring the engine to readiness."""

    def stop(self, grace_s: float | None = None) -> None:
        """End it, at whatever point it is."""


Make = Callable[[ModelSpec, int, tuple[int, ...], Callable[[EngineError], None]], Engine]


class Machine:
    """The engines that run here.

    Args:
        fetch: Fetches a model's weights where they are not here yet; blocks.
        make: Returns an engine for a model, a port, GPUs, and what is to be told of its death; blocks.
        free_memory: Returns bytes that may be used.
        needs_memory: Returns bytes that a model's engine takes.
        gpus: Numbers of the GPUs; none: engines run on the processor.
        n_gpu: Returns how many of them a model takes.
        idle_s: How long an engine without requests goes on.
        on_wake: Called after each wake of a pool.
        say: Called with a sentence for people.
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
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.fetch, self.make, self.on_wake, self.say = fetch, make, on_wake, say
        self._free_memory, self._needs_memory = free_memory, needs_memory
        self._gpus, self._n_gpu, self._idle_s = gpus, n_gpu, idle_s
        self._pools: dict[str, LocalPool] = {}
        self.starting = asyncio.Lock()  # one at a time: each takes the room that it was promised
        self._retiring: asyncio.Task[None] | None = None
        self.ending: set[Engine] = set()
        self.closed = False

    def pool(self, spec: ModelSpec, gpu: Gpu | None = None) -> LocalPool:
        """Return the pool of a model; whatever GPU is asked for, it is this machine's."""
        del gpu
        if (pool := self._pools.get(spec.key)) is None:
            pool = self._pools[spec.key] = LocalPool(spec, self)
        return pool

    @property
    def live(self) -> list[LocalPool]:
        """The pools that have an engine, least recently used first."""
        return sorted((pool for pool in self._pools.values() if pool.engine), key=lambda pool: pool.used_at)

    async def make_room(self, pool: LocalPool) -> tuple[int, ...] | None:
        """Return the GPUs that a pool's engine gets, once idle engines have made room; None: busy ones are in the way.

        Least recently used ones end first, and none does in vain. What nothing is in the way of may always try.
        """
        others = [other for other in self.live if other is not pool]
        if not self._fits(pool.spec, others, ended=[]):
            idle = [other for other in others if not other.in_use]
            if len(idle) < len(others) and not self._fits(pool.spec, others, ended=idle):
                return None
            for other in idle:
                if self._fits(pool.spec, others, ended=[]):
                    break
                if other.in_use:
                    return None
                self.say(f"{other.spec.key} is stopped to make room for {pool.spec.key}.")
                await other.stop()
                others.remove(other)
        return tuple(self._free_gpus(others)[: self._n_gpu(pool.spec)])

    def _fits(self, spec: ModelSpec, others: list[LocalPool], ended: list[LocalPool]) -> bool:
        """Tell whether a model fits beside the others, when some of them have ended."""
        if not others or len(ended) == len(others):
            return True
        if self._gpus:
            return len(self._free_gpus([other for other in others if other not in ended])) >= self._n_gpu(spec)
        freed = sum(self._needs_memory(other.spec) for other in ended)
        return self._free_memory() + freed >= self._needs_memory(spec)

    def _free_gpus(self, others: list[LocalPool]) -> list[int]:
        taken = {gpu for other in others for gpu in other.gpus}
        return [gpu for gpu in self._gpus if gpu not in taken]

    def begin(self) -> None:
        """Begin to end engines that are idle; needs a running loop."""
        self._retiring = asyncio.create_task(self._retire(), name="retire idle engines")

    async def _retire(self) -> None:
        while True:
            for pool in self.live:
                if not pool.in_use and (idle_s := pool.idle_s) >= self._idle_s:
                    self.say(
                        f"{pool.spec.key} is stopped after {idle_s:.0f} s without a request; the next one wakes it."
                    )
                    await pool.stop()
            await asyncio.sleep(min(1.0, self._idle_s / 4))

    async def close(self, grace_s: float | None = None) -> None:
        """End all engines, ready, starting or ending already, with the same grace; nothing starts any more."""
        self.closed = True
        if self._retiring:
            self._retiring.cancel()
        stops = [pool.stop(grace_s) for pool in self._pools.values()]
        await asyncio.gather(*(pool.close() for pool in self._pools.values()), *stops)

    def kill(self) -> None:
        """End at once what `close` is waiting for."""
        for engine in self.ending:
            threading.Thread(target=engine.stop, args=(0,), name="gateway-kill", daemon=True).start()


class LocalPool(Pool):
    """One engine at most, on a port and with a key of its own.

    Args:
        spec: The model.
        machine: What it shares with the others.

    Attributes:
        engine: Its engine, ready or on its way.
        gpus: Numbers of the GPUs that the engine has.
    """

    def __init__(self, spec: ModelSpec, machine: Machine) -> None:
        super().__init__(spec, PLACE, on_wake=machine.on_wake)
        self._machine = machine
        self.engine: Engine | None = None
        self._address: Address | None = None
        self._last: Address | None = None
        self._stopping = asyncio.Event()
        self._stopping.set()
        self.gpus: tuple[int, ...] = ()

    @property
    def idle_s(self) -> float:
        """How long it has had no request; 0 while it starts."""
        return time.monotonic() - self.used_at if not self.in_use and self.state != "waking" else 0.0

    def address(self) -> Address | None:
        """Return where its engine listens."""
        return self._address

    def lost(self) -> None:
        """Have the next request find out whether the engine still answers; its death may be told a moment later."""
        self._address = None

    def adopt(self, engine: Engine, port: int, key: str, gpus: tuple[int, ...] = ()) -> None:
        """Take an engine that is ready already."""
        self.engine, self.gpus = engine, gpus
        self._ready_at(_address(port, key))

    async def wake(self) -> Address:
        """Fetch the weights, make room, start the engine."""
        await self._stopping.wait()
        if self._machine.closed:
            raise WakeError("The service is being stopped.")
        if self.engine and self._last and await self._still_serves(self.engine, self._last):
            return self._ready_at(self._last)
        try:
            await in_thread(lambda: self._machine.fetch(self.spec))
            while True:
                async with self._machine.starting:
                    gpus = await self._machine.make_room(self)
                    if gpus is not None:
                        return self._ready_at(await self._start(gpus))
                await asyncio.sleep(_POLL_S)  # others may start meanwhile
        except Exception as error:
            self.engine = None
            self._machine.say(f"{self.spec.key} did not start: {error}")
            raise WakeError(str(error) or type(error).__name__) from error

    async def _start(self, gpus: tuple[int, ...]) -> Address:
        self.gpus, port, key = gpus, free_port(), new_key()
        loop = asyncio.get_running_loop()

        def died(error: EngineError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._died, engine, error)

        engine = await in_thread(lambda: self._machine.make(self.spec, port, gpus, died))
        self.engine = engine
        await in_thread(engine.prepare)
        await in_thread(lambda: engine.start({digest(key.encode()): "gateway"}))
        return _address(port, key)

    def _ready_at(self, address: Address) -> Address:
        self._address = self._last = address
        self.used_at = time.monotonic()
        return address

    async def _still_serves(self, engine: Engine, address: Address) -> bool:
        """Tell whether an engine that was lost is there after all; one that is not is ended.

        One that is only slow is: whether it hangs is for others to find out.
        """
        asking = asyncio.ensure_future(_answers(address))
        while self.engine is engine and not asking.done():
            await asyncio.wait((asking,), timeout=_POLL_S)
        if self.engine is engine and await asking:
            return True
        asking.cancel()
        if self.engine is engine:
            self._machine.say(f"The engine of {self.spec.key} does not answer; another one is started.")
            await in_thread(lambda: engine.stop(0))
        self.engine = None
        return False

    def _died(self, engine: Engine, error: EngineError) -> None:
        if engine is not self.engine:
            return
        self.engine = self._address = None
        self._machine.say(f"The engine of {self.spec.key} died; the next request starts another. {error}")

    async def stop(self, grace_s: float | None = None) -> None:
        """End its engine, or wait for the end that is under way; a request that comes meanwhile wakes another then."""
        engine, self.engine, self._address = self.engine, None, None
        if engine is None:
            await self._stopping.wait()
            return
        self._stopping.clear()
        self._machine.ending.add(engine)

        def ended(_: object) -> None:
            self._machine.ending.discard(engine)
            self._stopping.set()

        ending = asyncio.ensure_future(in_thread(lambda: engine.stop(grace_s)))
        ending.add_done_callback(ended)
        await asyncio.shield(ending)


def new_key() -> str:
    """Return a key that only this process and one engine know: others on this machine cannot pass by the door."""
    return secrets.token_urlsafe(32)


async def _answers(address: Address) -> bool:
    """Tell whether anybody answers there, or takes his time; nobody does where a connection is refused or broken."""
    import aiohttp  # noqa: PLC0415 - slow to import, and the first engine is on its way before it is needed

    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(_ANSWERS_S)) as http,
            http.get(f"{address.url}/health"),
        ):
            return True
    except TimeoutError:
        return True
    except (aiohttp.ClientError, OSError):
        await asyncio.sleep(_TOLD_S)
        return False


def _address(port: int, key: str) -> Address:
    return Address(f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {key}"})
