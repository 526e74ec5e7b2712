"""Engines on one machine: started by the first request, ended when idle, ended to make room for others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping

import pytest

from service.errors import EngineError, MemoryTooSmallError
from service.gateway.api_errors import Refusal
from service.gateway.local_pool import LocalPool, Machine
from service.registry.models import ModelSpec
from tests.gateway.upstream import eventually

GB = 10**9
SPECS = {
    name: ModelSpec(key=name, path="x", weights_gb=size)
    for name, size in (("a", 4.0), ("b", 4.0), ("c", 4.0), ("d", 4.0))
}


class Engine:
    """What a replica looks like from a pool: it blocks, it can be ended at any point, it can die."""

    def __init__(self, spec: ModelSpec, port: int, gpus: tuple[int, ...], died: Callable[[EngineError], None]) -> None:
        self.spec, self.port, self.gpus, self.died = spec, port, gpus, died
        self.may_start = threading.Event()
        self.may_start.set()
        self.running = False
        self.stop_s = 0.0
        self.stops: list[float | None] = []
        self.digests: Mapping[str, str] = {}

    def prepare(self) -> None:
        """Do nothing."""

    def start(self, digests: Mapping[str, str]) -> None:
        """Start when the test lets it."""
        self.may_start.wait(5)
        if self.stops:
            raise EngineError("The engine was stopped while somebody waited for it.")
        self.digests, self.running = digests, True

    def stop(self, grace_s: float | None = None) -> None:
        """End."""
        self.stops.append(grace_s)
        self.may_start.set()
        time.sleep(self.stop_s)
        self.running = False


class House:
    """A machine of ten gigabytes, or of two GPUs."""

    def __init__(self, gpus: tuple[int, ...] = (), idle_s: float = 900.0) -> None:
        self.engines: list[Engine] = []
        self.said: list[str] = []
        self.hold = False
        self.refuses: MemoryTooSmallError | None = None
        self.machine = Machine(
            self._fetch,
            self._make,
            free_memory=lambda: 10 * GB - sum(4 * GB for engine in self.engines if engine.running),
            needs_memory=lambda spec: int((spec.weights_gb or 0) * GB),
            gpus=gpus,
            idle_s=idle_s,
            say=self.said.append,
        )

    def _fetch(self, _: ModelSpec) -> None:
        if self.refuses:
            raise self.refuses

    def _make(self, spec: ModelSpec, port: int, gpus: tuple[int, ...], died: Callable[[EngineError], None]) -> Engine:
        engine = Engine(spec, port, gpus, died)
        if self.hold:
            engine.may_start.clear()
        self.engines.append(engine)
        return engine

    def pool(self, name: str) -> LocalPool:
        """Return the pool of a model."""
        return self.machine.pool(SPECS[name])

    @property
    def running(self) -> list[str]:
        """The models whose engines run."""
        return [engine.spec.key for engine in self.engines if engine.running]


def test_pool_wakes_once_for_all_with_a_key_of_its_own() -> None:
    """Nobody on this machine passes by the door: the engine wants a key that only the door has."""

    async def run() -> None:
        house = House()
        addresses = await asyncio.gather(*(house.pool("a").ready() for _ in range(20)))
        (engine,) = house.engines
        assert {address.url for address in addresses} == {f"http://127.0.0.1:{engine.port}"}
        assert addresses[0].headers["Authorization"].startswith("Bearer ")
        assert len(engine.digests) == 1
        assert house.pool("a").state == "ready"
        await house.machine.close(0)
        assert house.running == []

    asyncio.run(run())


def test_pool_least_recently_used_makes_room() -> None:
    """Memory for two: the third ends the one that was not used for longest."""

    async def run() -> None:
        house = House()
        for name in ("a", "b", "a"):
            with house.pool(name).use():
                await house.pool(name).ready()
        await house.pool("c").ready()
        assert house.running == ["a", "c"]
        assert house.said == ["b is stopped to make room for c."]
        assert house.pool("b").state == "cold"
        await house.machine.close(0)

    asyncio.run(run())


def test_pool_waits_for_a_busy_one_and_never_ends_it() -> None:
    """A stream is not cut for somebody else's model."""

    async def run() -> None:
        house = House()
        with house.pool("a").use(), house.pool("b").use():
            await house.pool("a").ready()
            await house.pool("b").ready()
            waiting = asyncio.ensure_future(house.pool("c").ready())
            await asyncio.sleep(0.2)
            assert house.running == ["a", "b"]
            assert house.pool("c").state == "waking"
        await waiting
        assert len(house.running) == 2
        assert "c" in house.running
        await house.machine.close(0)

    asyncio.run(run())


def test_pool_that_waits_for_a_busy_one_ends_nobody_in_vain_and_keeps_nobody_waiting() -> None:
    """A model for two GPUs, of which one is busy, ends no idle one yet; a third model starts meanwhile."""

    async def run() -> None:
        house = House(gpus=(0, 1, 2))
        house.machine._n_gpu = lambda spec: 3 if spec.key == "c" else 1
        await house.pool("b").ready()
        with house.pool("a").use():
            await house.pool("a").ready()
            waiting = asyncio.ensure_future(house.pool("c").ready())
            await asyncio.sleep(0.2)
            assert house.running == ["b", "a"]
            await house.pool("d").ready()
            assert house.running == ["b", "a", "d"]
        await waiting
        assert house.running == ["c"]
        await house.machine.close(0)

    asyncio.run(run())


def test_pool_in_use_again_is_not_ended_for_having_been_idle() -> None:
    """Two are idle; while the first one ends, a request comes for the second."""

    async def run() -> None:
        house = House(idle_s=0.3)
        for name in ("a", "b"):
            await house.pool(name).ready()
        house.engines[0].stop_s = 1.0
        house.machine.begin()
        await eventually(lambda: bool(house.engines[0].stops))
        with house.pool("b").use():
            await asyncio.sleep(1.5)
            assert house.running == ["b"]
        await house.machine.close(0)

    asyncio.run(run())


def test_machine_closed_waits_for_an_end_that_is_under_way() -> None:
    """An engine that was being ended for another reason is ended when the machine is closed."""

    async def run() -> None:
        house = House()
        await house.pool("a").ready()
        house.engines[0].stop_s = 0.5
        ending = asyncio.ensure_future(house.pool("a").stop())
        await asyncio.sleep(0.1)
        ending.cancel()
        await house.machine.close(None)
        assert house.running == []

    asyncio.run(run())


def test_pool_lost_by_one_client_keeps_the_engine_that_still_listens() -> None:
    """One broken connection is no reason to end everybody's streams."""

    async def run() -> None:
        house = House()
        first = await house.pool("a").ready()

        async def healthy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(healthy, "127.0.0.1", house.engines[0].port)
        async with server:
            house.pool("a").lost()
            assert await house.pool("a").ready() == first
            assert len(house.engines) == 1
        house.pool("a").lost()
        await house.pool("a").ready()
        assert len(house.engines) == 2
        await house.machine.close(0)

    asyncio.run(run())


def test_pool_on_gpus_takes_its_own() -> None:
    """An engine takes a whole GPU; the third model ends the first one's and takes that."""

    async def run() -> None:
        house = House(gpus=(0, 1))
        for name in ("a", "b", "c"):
            await house.pool(name).ready()
        assert [engine.gpus for engine in house.engines] == [(0,), (1,), (0,)]
        assert house.running == ["b", "c"]
        await house.machine.close(0)

    asyncio.run(run())


def test_pool_idle_is_ended_and_woken_by_the_next_request() -> None:
    """Not while a request runs, however long that takes."""

    async def run() -> None:
        house = House(idle_s=0.2)
        house.machine.begin()
        with house.pool("a").use():
            await house.pool("a").ready()
            await asyncio.sleep(0.5)
            assert house.running == ["a"]
        await eventually(lambda: house.running == [])
        assert "without a request" in house.said[0]
        await house.pool("a").ready()
        assert house.running == ["a"]
        await house.machine.close(0)

    asyncio.run(run())


def test_pool_whose_engine_dies_starts_another_with_the_next_request() -> None:
    """What killed it is said; an engine that was given up cannot end its successor."""

    async def run() -> None:
        house = House()
        await house.pool("a").ready()
        first = house.engines[0]
        first.running = False
        threading.Thread(target=first.died, args=(EngineError("killed by SIGKILL"),)).start()
        await eventually(lambda: house.pool("a").state == "cold")
        assert "killed by SIGKILL" in house.said[0]
        await house.pool("a").ready()
        first.died(EngineError("late"))
        await asyncio.sleep(0.05)
        assert house.pool("a").state == "ready"
        await house.machine.close(0)

    asyncio.run(run())


def test_pool_that_cannot_start_says_why() -> None:
    """What this machine refuses is told to whoever asked."""

    async def run() -> None:
        house = House()
        house.refuses = MemoryTooSmallError("The weights of 'a' are 500 GB.")
        with pytest.raises(Refusal, match="500 GB") as caught:
            await house.pool("a").ready()
        assert caught.value.status == 503
        assert house.pool("a").state == "cold"
        await house.machine.close(0)

    asyncio.run(run())


def test_pool_closed_while_it_starts_ends_its_engine_and_tells_who_waits() -> None:
    """Ctrl-C during a boot on demand leaves nothing."""

    async def run() -> None:
        house = House()
        house.hold = True
        waiting = asyncio.ensure_future(house.pool("a").ready())
        await eventually(lambda: bool(house.engines))
        await asyncio.sleep(0.05)
        await house.machine.close(None)
        with pytest.raises(Refusal, match="being stopped"):
            await waiting
        assert house.engines[0].stops
        assert house.running == []

    asyncio.run(run())
