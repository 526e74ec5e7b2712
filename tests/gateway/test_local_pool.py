"""Engines on one machine: started by the first request, stopped at the idle timeout, evicted for others."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping

import pytest

from service.errors import EngineError, MemoryTooSmallError
from service.gateway.api_errors import APIError
from service.gateway.local_pool import LocalPool
from service.gateway.local_scheduler import LocalScheduler
from service.registry.models import ModelSpec
from tests.gateway.upstream import eventually

GB = 10**9
SPECS = {
    name: ModelSpec(key=name, path="x", weights_gb=size)
    for name, size in (("a", 4.0), ("b", 4.0), ("c", 4.0), ("d", 4.0))
}


class Engine:
    """A replica as a pool sees it: its methods block, it can be ended in any state, it can die."""

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
        """Start once the test allows it."""
        self.may_start.wait(5)
        if self.stops:
            raise EngineError("The engine was stopped before it was ready.")
        self.digests, self.running = digests, True

    def stop(self, grace_s: float | None = None) -> None:
        """End."""
        self.stops.append(grace_s)
        self.may_start.set()
        time.sleep(self.stop_s)
        self.running = False


class FakeMachine:
    """A machine with ten gigabytes, or with GPUs."""

    def __init__(self, gpus: tuple[int, ...] = (), idle_s: float = 900.0) -> None:
        self.engines: list[Engine] = []
        self.hold = False
        self.taken = 0  # by other programs
        self.refuses: MemoryTooSmallError | None = None
        self.scheduler = LocalScheduler(
            self._fetch,
            self._make,
            free_memory=lambda: 10 * GB - self.taken - sum(4 * GB for engine in self.engines if engine.running),
            needs_memory=lambda spec: int((spec.weights_gb or 0) * GB),
            gpus=gpus,
            idle_s=idle_s,
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
        return self.scheduler.pool(SPECS[name])

    @property
    def running(self) -> list[str]:
        """The models whose engines run."""
        return [engine.spec.key for engine in self.engines if engine.running]


def test_local_pool_wakes_once_for_all_requests_with_a_key_of_its_own() -> None:
    """Only the gateway has the engine's key, so that no other user of this machine reaches the engine."""

    async def run() -> None:
        machine = FakeMachine()
        endpoints = await asyncio.gather(*(machine.pool("a").ready() for _ in range(20)))
        (engine,) = machine.engines
        assert {endpoint.url for endpoint in endpoints} == {f"http://127.0.0.1:{engine.port}"}
        assert endpoints[0].headers["Authorization"].startswith("Bearer ")
        assert len(engine.digests) == 1
        assert machine.pool("a").state == "ready"
        await machine.scheduler.close(0)
        assert machine.running == []

    asyncio.run(run())


def test_local_pool_least_recently_used_is_evicted(caplog: pytest.LogCaptureFixture) -> None:
    """Memory for two: the third evicts the one that has not been used for the longest time."""
    caplog.set_level(logging.INFO, "service.gateway")

    async def run() -> None:
        machine = FakeMachine()
        for name in ("a", "b", "a"):
            with machine.pool(name).track_request():
                await machine.pool(name).ready()
        await machine.pool("c").ready()
        assert machine.running == ["a", "c"]
        assert caplog.messages == ["b is stopped to make room for c."]
        assert machine.pool("b").state == "cold"
        await machine.scheduler.close(0)

    asyncio.run(run())


def test_local_pool_waits_for_a_busy_pool_and_never_evicts_it() -> None:
    """No running request is broken off for another model."""

    async def run() -> None:
        machine = FakeMachine()
        with machine.pool("a").track_request(), machine.pool("b").track_request():
            await machine.pool("a").ready()
            await machine.pool("b").ready()
            waiting = asyncio.ensure_future(machine.pool("c").ready())
            await asyncio.sleep(0.2)
            assert machine.running == ["a", "b"]
            assert machine.pool("c").state == "waking"
        await waiting
        assert len(machine.running) == 2
        assert "c" in machine.running
        await machine.scheduler.close(0)

    asyncio.run(run())


def test_local_pool_waiting_for_busy_pool_evicts_nothing() -> None:
    """A model for three GPUs, of which one is busy, evicts no idle one yet; another model starts meanwhile."""

    async def run() -> None:
        machine = FakeMachine(gpus=(0, 1, 2))
        machine.scheduler._n_gpu = lambda spec: 3 if spec.key == "c" else 1
        await machine.pool("b").ready()
        with machine.pool("a").track_request():
            await machine.pool("a").ready()
            waiting = asyncio.ensure_future(machine.pool("c").ready())
            await asyncio.sleep(0.2)
            assert machine.running == ["b", "a"]
            await machine.pool("d").ready()
            assert machine.running == ["b", "a", "d"]
        await waiting
        assert machine.running == ["c"]
        await machine.scheduler.close(0)

    asyncio.run(run())


def test_local_pool_in_use_again_is_not_stopped_for_having_been_idle() -> None:
    """Two are idle; while the first one stops, a request comes for the second."""

    async def run() -> None:
        machine = FakeMachine(idle_s=0.3)
        for name in ("a", "b"):
            await machine.pool(name).ready()
        machine.engines[0].stop_s = 1.0
        machine.scheduler.begin()
        await eventually(lambda: bool(machine.engines[0].stops))
        with machine.pool("b").track_request():
            await asyncio.sleep(1.5)
            assert machine.running == ["b"]
        await machine.scheduler.close(0)

    asyncio.run(run())


def test_scheduler_close_waits_for_an_engine_that_is_stopping() -> None:
    """An engine that was being stopped for another reason has ended when `close` returns."""

    async def run() -> None:
        machine = FakeMachine()
        await machine.pool("a").ready()
        machine.engines[0].stop_s = 0.5
        ending = asyncio.ensure_future(machine.pool("a").stop())
        await asyncio.sleep(0.1)
        ending.cancel()
        await machine.scheduler.close(None)
        assert machine.running == []

    asyncio.run(run())


def test_local_pool_marked_unreachable_keeps_an_engine_that_still_listens() -> None:
    """One broken connection must not end the streams of other clients."""

    async def run() -> None:
        machine = FakeMachine()
        first = await machine.pool("a").ready()

        async def healthy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(healthy, "127.0.0.1", machine.engines[0].port)
        async with server:
            machine.pool("a").mark_unreachable()
            assert await machine.pool("a").ready() == first
            assert len(machine.engines) == 1
        machine.pool("a").mark_unreachable()
        await machine.pool("a").ready()
        assert len(machine.engines) == 2
        await machine.scheduler.close(0)

    asyncio.run(run())


def test_local_pool_on_gpus_takes_its_own() -> None:
    """An engine takes a whole GPU; the third model evicts the first one and takes its GPU."""

    async def run() -> None:
        machine = FakeMachine(gpus=(0, 1))
        for name in ("a", "b", "c"):
            await machine.pool(name).ready()
        assert [engine.gpus for engine in machine.engines] == [(0,), (1,), (0,)]
        assert machine.running == ["b", "c"]
        await machine.scheduler.close(0)

    asyncio.run(run())


def test_local_pool_idle_is_stopped_and_woken_by_the_next_request(caplog: pytest.LogCaptureFixture) -> None:
    """It is not stopped while a request runs, however long that takes."""
    caplog.set_level(logging.INFO, "service.gateway")

    async def run() -> None:
        machine = FakeMachine(idle_s=0.2)
        machine.scheduler.begin()
        with machine.pool("a").track_request():
            await machine.pool("a").ready()
            await asyncio.sleep(0.5)
            assert machine.running == ["a"]
        await eventually(lambda: machine.running == [])
        assert "without a request" in caplog.messages[0]
        await machine.pool("a").ready()
        assert machine.running == ["a"]
        await machine.scheduler.close(0)

    asyncio.run(run())


def test_local_pool_whose_engine_dies_starts_another_with_the_next_request(caplog: pytest.LogCaptureFixture) -> None:
    """The reason of the death is logged; a late report of it does not end the next engine."""

    async def run() -> None:
        machine = FakeMachine()
        await machine.pool("a").ready()
        first = machine.engines[0]
        first.running = False
        threading.Thread(target=first.died, args=(EngineError("killed by SIGKILL"),)).start()
        await eventually(lambda: machine.pool("a").state == "cold")
        assert "killed by SIGKILL" in caplog.messages[0]
        await machine.pool("a").ready()
        first.died(EngineError("late"))
        await asyncio.sleep(0.05)
        assert machine.pool("a").state == "ready"
        await machine.scheduler.close(0)

    asyncio.run(run())


def test_local_pool_that_cannot_start_answers_with_the_reason() -> None:
    """The client gets the reason why this machine refuses the model."""

    async def run() -> None:
        machine = FakeMachine()
        machine.refuses = MemoryTooSmallError("The weights of 'a' are 500 GB.")
        with pytest.raises(APIError, match="500 GB") as caught:
            await machine.pool("a").ready()
        assert caught.value.status == 503
        assert machine.pool("a").state == "cold"
        await machine.scheduler.close(0)

    asyncio.run(run())


def test_local_pool_closed_while_it_starts_ends_its_engine_and_answers_waiting_requests() -> None:
    """Ctrl-C during a boot on demand leaves no engine behind."""

    async def run() -> None:
        machine = FakeMachine()
        machine.hold = True
        waiting = asyncio.ensure_future(machine.pool("a").ready())
        await eventually(lambda: bool(machine.engines))
        await asyncio.sleep(0.05)
        await machine.scheduler.close(None)
        with pytest.raises(APIError, match="shutting down"):
            await waiting
        assert machine.engines[0].stops
        assert machine.running == []

    asyncio.run(run())


def test_local_pool_waiting_for_busy_pool_starts_as_soon_as_that_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the busy pool's request, even a failed one, wakes the waiting pool without a poll."""
    monkeypatch.setattr("service.gateway.local_pool._RECHECK_S", 60.0)

    async def run() -> None:
        machine = FakeMachine(gpus=(0,))
        with pytest.raises(ConnectionError), machine.pool("a").track_request():
            await machine.pool("a").ready()
            waiting = asyncio.ensure_future(machine.pool("b").ready())
            await asyncio.sleep(0.1)
            assert machine.running == ["a"]
            raise ConnectionError
        async with asyncio.timeout(2):
            await waiting
        assert machine.running == ["b"]
        await machine.scheduler.close(0)

    asyncio.run(run())


def test_local_pool_waiting_for_memory_starts_once_another_program_frees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing reports that, so the pool looks again from time to time."""
    monkeypatch.setattr("service.gateway.local_pool._RECHECK_S", 0.05)

    async def run() -> None:
        machine = FakeMachine()
        machine.taken = 4 * GB
        with machine.pool("a").track_request():
            await machine.pool("a").ready()
            waiting = asyncio.ensure_future(machine.pool("b").ready())
            await asyncio.sleep(0.2)
            assert machine.running == ["a"]
            machine.taken = 0
            async with asyncio.timeout(2):
                await waiting
            assert machine.running == ["a", "b"]
        await machine.scheduler.close(0)

    asyncio.run(run())
