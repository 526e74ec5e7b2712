"""Engines on one machine: started by the first request, stopped at the idle timeout, evicted for others."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from service.boots.phases import Phases
from service.errors import (
    EngineError,
    GatedModelError,
    GpuCountError,
    HubUnreachableError,
    MemoryTooSmallError,
    WeightsError,
)
from service.gateway import pool
from service.gateway.local_pool import LocalPool
from service.gateway.local_scheduler import LocalScheduler
from service.in_engine.vllm_service.api_error import APIError
from service.registry.models import ModelSpec, Registry
from tests.gateway.upstream import eventually, no_descriptors

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
        self.max_model_len: int | None = None
        self.stop_s = 0.0
        self.stops: list[float | None] = []
        self.digests: Mapping[str, str] = {}
        self.phases = Phases()
        self.adapters = {adapter.name for adapter in spec.adapters}
        self.refuses: str | None = None  # the adapter of this name

    def load_adapter(self, name: str, directory: Path) -> None:
        """Load one, unless it is the one that the test has it refuse."""
        if name == self.refuses:
            raise EngineError(f"The engine refused adapter '{name}' of {directory}.")
        self.adapters.add(name)

    def unload_adapter(self, name: str) -> None:
        """Forget one."""
        self.adapters.discard(name)

    def prepare(self) -> None:
        """Do nothing."""

    def start(self, digests: Mapping[str, str]) -> None:
        """Start once the test allows it."""
        self.may_start.wait(5)
        if self.stops:
            raise EngineError("The engine was stopped before it was ready.")
        self.digests, self.running, self.max_model_len = digests, True, 1234

    def stop(self, grace_s: float | None = None) -> None:
        """End."""
        self.stops.append(grace_s)
        self.may_start.set()
        time.sleep(self.stop_s)
        self.running = False

    def kill(self) -> EngineError:
        """Die, and be reported."""
        self.running, error = False, EngineError("Its core was killed.")
        self.died(error)
        return error


class FakeMachine:
    """A machine with ten gigabytes, or with GPUs."""

    def __init__(self, gpus: tuple[int, ...] = (), idle_s: float = 900.0) -> None:
        self.engines: list[Engine] = []
        self.hold = False
        self.taken = 0  # by other programs
        self.refuses: Exception | None = None
        self.scheduler = LocalScheduler(
            self._fetch,
            self._make,
            free_memory=lambda: 10 * GB - self.taken - sum(4 * GB for engine in self.engines if engine.running),
            needs_memory=lambda spec: int((spec.weights_gb or 0) * GB),
            gpus=gpus,
            idle_s=idle_s,
            adapters=self._adapters,
        )
        self.bad: str | None = None  # the adapter whose files are wrong

    def _adapters(self, spec: ModelSpec, _fetch: bool) -> dict[str, Path]:
        if self.bad in {adapter.name for adapter in spec.adapters}:
            raise WeightsError(f"Adapter '{self.bad}' is wrong.")
        return {adapter.name: Path(adapter.name) for adapter in spec.adapters}

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


def test_local_pool_phases_of_a_wake_count_from_its_begin() -> None:
    """An engine's boot counts from its own zero, which comes after a fetch of weights or a wait for memory."""

    async def run() -> None:
        machine = FakeMachine()
        machine.hold = True
        one = machine.pool("a")
        waking = asyncio.ensure_future(one.ready())
        await eventually(lambda: bool(machine.engines))
        (engine,) = machine.engines
        zero = one._woken_at + 100
        engine.phases.begin(zero)
        engine.phases.add("load", zero + 1, zero + 3)
        await eventually(lambda: one.engine is engine)
        ((name, start, end),) = [(span.name, span.start, span.end) for span in one.wake_phases]
        assert (name, start, end) == ("load", pytest.approx(101, abs=0.01), pytest.approx(103, abs=0.01))
        engine.may_start.set()
        await waking
        assert one.wake_phases == ()
        await machine.scheduler.close(0)

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


def test_local_pool_waits_for_the_report_of_a_death(caplog: pytest.LogCaptureFixture) -> None:
    """An engine that dies closes its port first: to end it then would hide what it died of."""

    async def run() -> None:
        machine = FakeMachine()
        await machine.pool("a").ready()
        machine.pool("a").mark_unreachable()
        waiting = asyncio.ensure_future(machine.pool("a").ready())
        await asyncio.sleep(1.5)
        machine.engines[0].died(EngineError("The kernel killed a process because memory ran out."))
        await waiting
        assert (machine.engines[0].stops, len(machine.engines)) == ([], 2)
        await machine.scheduler.close(0)

    asyncio.run(run())
    assert "because memory ran out" in caplog.text


def test_local_pool_marked_unreachable_keeps_an_engine_that_still_listens(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One broken connection must not end the streams of other clients, nor must our own want of descriptors."""
    monkeypatch.setattr("service.gateway.local_pool._DEATH_REPORT_S", 1.0)

    async def run() -> None:
        machine = FakeMachine()
        first = await machine.pool("a").ready()

        broken = 0  # of an engine without descriptors

        async def healthy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal broken
            await reader.readuntil(b"\r\n\r\n")
            broken -= 1
            if broken >= 0:
                writer.transport.abort()
                return
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(healthy, "127.0.0.1", machine.engines[0].port)
        async with server:
            machine.pool("a").mark_unreachable()
            assert await machine.pool("a").ready() == first
            machine.pool("a").mark_unreachable()
            with no_descriptors():
                assert await machine.pool("a").ready() == first
            broken = 2
            machine.pool("a").mark_unreachable()
            assert await machine.pool("a").ready() == first
            assert len(machine.engines) == 1
        machine.pool("a").mark_unreachable()
        await machine.pool("a").ready()
        assert (machine.engines[0].stops, len(machine.engines)) == ([], 2)
        await machine.scheduler.close(0)

    asyncio.run(run())
    assert "another one is started. Its core was killed." in caplog.text


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


def test_engine_of_an_entry_that_a_reload_changed_ends_when_it_is_idle() -> None:
    """The request that it has is finished, the next one wakes an engine of the new entry, and both end at the close."""

    async def run() -> None:
        machine = FakeMachine()
        machine.scheduler.begin()
        old, changed = machine.pool("a"), SPECS["a"].model_copy(update={"max_model_len": 64})
        with old.track_request():
            await old.ready()
            await machine.pool("b").ready()
            machine.scheduler.replace(Registry({**SPECS, "a": changed}))
            assert machine.pool("b").engine
            new = machine.scheduler.pool(changed)
            assert (new is old, new.spec) == (False, changed)
            assert await asyncio.wait_for(asyncio.shield(old.ready()), 5)
        await new.ready()
        await eventually(lambda: not (old.engine or machine.scheduler.stopping))
        assert [engine.spec for engine in machine.engines if engine.running] in ([SPECS["b"], changed], [changed])
        with old.track_request():  # one that had chosen it before the reload
            await old.ready()
        assert machine.scheduler.pool(changed) is new
        await machine.scheduler.close(0)
        assert machine.running == []

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


@pytest.mark.parametrize(
    ("refusal", "headers"),
    [
        (GatedModelError("It is gated."), {"Retry-After": "5", "x-should-retry": "false"}),
        (EngineError("Exit code 1."), {"Retry-After": "5", "x-should-retry": "false"}),
        (OSError("Too many open files."), {"Retry-After": "5", "x-should-retry": "false"}),
        (HubUnreachableError("The hub is not in reach."), {"Retry-After": "5"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_local_pool_that_cannot_start_answers_with_the_reason(refusal: Exception, headers: dict[str, str]) -> None:
    """The client gets the reason and the time of the next start, and repeats by itself only where that may help."""

    async def run() -> None:
        machine = FakeMachine()
        machine.refuses = refusal
        for _ in range(2):  # the second time from memory
            with pytest.raises(APIError, match=str(refusal)) as caught:
                await machine.pool("a").ready()
            assert (caught.value.status, caught.value.code) == (503, "model_failed")
            assert caught.value.headers == headers
        assert machine.pool("a").state == "cold"
        await machine.scheduler.close(0)

    asyncio.run(run())


def test_local_pool_of_a_model_that_turns_out_too_large_is_refused_for_good() -> None:
    """What a download tells, such as the size of the weights, makes the answer a 400 that no client repeats."""

    async def run() -> None:
        machine = FakeMachine()
        machine.refuses = MemoryTooSmallError("The weights of 'a' are 500 GB.")
        with pytest.raises(APIError, match="500 GB") as caught:
            await machine.pool("a").ready()
        assert (caught.value.status, caught.value.code) == (400, "model_too_large")
        await machine.scheduler.close(0)

    asyncio.run(run())


def test_local_pool_of_a_model_that_does_not_fit_is_refused_before_a_wake() -> None:
    """Nothing is fetched or started for it; a pool that is ready is not asked."""

    async def run() -> None:
        machine = FakeMachine()
        await machine.pool("a").ready()

        def refuse(spec: ModelSpec) -> None:
            raise GpuCountError(f"'{spec.key}' is to run on n_gpu=2 GPUs and 1 are visible here.")

        machine.scheduler.check = refuse
        machine.pool("a").check("a")
        with pytest.raises(APIError, match="n_gpu=2 GPUs") as caught:
            machine.pool("b").check("b")
        assert (caught.value.status, caught.value.code, caught.value.param) == (400, "model_too_large", "model")
        assert machine.running == ["a"]
        await machine.scheduler.close(0)

    asyncio.run(run())


def test_local_pool_knows_the_context_of_its_engine_once_it_has_run() -> None:
    """Before that it is what this machine would give; afterwards what the last engine had."""

    async def run() -> None:
        machine = FakeMachine()
        machine.scheduler.max_model_len = lambda _: 8192
        pool = machine.pool("a")
        assert pool.max_model_len == 8192
        await pool.ready()
        assert pool.max_model_len == 1234
        await pool.stop(0)
        assert pool.max_model_len == 1234
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
        with pytest.raises(APIError, match="shutting down") as caught:
            await waiting
        assert (caught.value.status, caught.value.code) == (503, "shutting_down")
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


@pytest.mark.parametrize(
    ("message", "lasts"),
    [
        ("The engine exited with code 2. Cause: 'error: unrecognized arguments: --x'.", True),
        ("The engine exited with code 1. Cause: 'ValueError: X is not supported for now'.", True),
        ("The engine exited with code 1. Cause: 'OutOfMemoryError: CUDA out of memory'.", False),
        ("The engine was killed by SIGKILL.", False),
    ],
)
def test_local_pool_does_not_try_again_for_an_hour_what_cannot_start(
    message: str, lasts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong flag stays wrong; memory may be free later, since other engines and programs take it too."""
    monkeypatch.setattr(pool, "FAILED_FOR_S", 0.0)

    async def run() -> None:
        machine = FakeMachine()
        machine.refuses = EngineError(message)
        for _ in range(2):
            with pytest.raises(APIError, match=re.escape(message)) as told:
                await machine.pool("a").ready()
            assert (
                "none is tried for an hour; correct its entry, or restart the service" in told.value.message
            ) is lasts
            machine.refuses = EngineError(f"{message} Again.")
        assert ("Again" in told.value.message) is not lasts

    asyncio.run(run())
