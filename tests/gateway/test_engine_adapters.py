"""Adapters of a running engine follow its entry: added, removed, refused, and changed while the engine starts."""

from __future__ import annotations

import asyncio
import logging

import pytest

from service.errors import ServiceError, WeightsError
from service.registry.models import Adapter, ModelSpec, Registry
from tests.gateway.test_local_pool import Engine, FakeMachine
from tests.gateway.upstream import eventually


def entry(*names: str, room: int = 3, source: str = "x", **fields: object) -> ModelSpec:
    """Return an entry with adapters of these names."""
    adapters = tuple(Adapter(name=name, path=f"{source}/{name}") for name in names)
    return ModelSpec.model_validate({"key": "a", "path": "x", "adapters": adapters, "max_cpu_loras": room, **fields})


class Reloaded:
    """A machine whose models file changes."""

    def __init__(self, spec: ModelSpec) -> None:
        self.machine = FakeMachine()
        self.scheduler = self.machine.scheduler
        self.spec = spec

    async def ready(self) -> Engine:
        """Wake the pool, and return its engine."""
        await self.scheduler.pool(self.spec).ready()
        return self.machine.engines[-1]

    async def reload(self, spec: ModelSpec) -> None:
        """Do what a reload does."""
        registry = Registry({"a": spec})
        try:
            await self.scheduler.prepare(registry)
        except ServiceError:
            self.scheduler.replace(Registry({"a": self.spec}))
            raise
        self.scheduler.replace(registry)
        self.spec = spec


def test_adapter_that_is_added_is_loaded_before_the_reload_ends() -> None:
    """Into the engine that runs, which serves on."""

    async def run() -> None:
        files = Reloaded(entry("one"))
        engine = await files.ready()
        await files.reload(entry("one", "two"))
        assert engine.adapters == {"one", "two"}
        assert files.scheduler.pool(files.spec).engine is engine
        await files.scheduler.close(0)
        assert len(files.machine.engines) == 1

    asyncio.run(run())


def test_adapter_that_is_removed_is_unloaded_once_the_requests_before_have_ended() -> None:
    """Those that come later do not hold it."""

    async def run() -> None:
        files = Reloaded(entry("one", "two"))
        engine = await files.ready()
        pool = files.scheduler.pool(files.spec)
        with pool.track_request():
            await files.reload(entry("two"))
            later = pool.track_request()
            later.__enter__()
            await asyncio.sleep(0.15)
            assert engine.adapters == {"one", "two"}
        await eventually(lambda: engine.adapters == {"two"})
        later.__exit__(None, None, None)
        await files.scheduler.close(0)

    asyncio.run(run())


def test_adapter_that_comes_back_before_it_was_unloaded_stays() -> None:
    """It need not be loaded again."""

    async def run() -> None:
        files = Reloaded(entry("one"))
        engine = await files.ready()
        with files.scheduler.pool(files.spec).track_request():
            await files.reload(entry())
            await files.reload(entry("one"))
        await asyncio.sleep(0.15)
        assert engine.adapters == {"one"}
        await files.reload(entry())
        await eventually(lambda: not engine.adapters)
        await files.reload(entry("one", source="y"))
        assert engine.adapters == {"one"}
        await files.scheduler.close(0)

    asyncio.run(run())


@pytest.mark.parametrize("by", ["engine", "files"])
def test_adapter_that_is_refused_changes_nothing(by: str) -> None:
    """What the same reload had loaded before it is unloaded."""

    async def run() -> None:
        files = Reloaded(entry("one"))
        engine = await files.ready()
        if by == "engine":
            engine.refuses = "bad"
        else:
            files.machine.bad = "bad"
        with pytest.raises(ServiceError):
            await files.reload(entry("one", "two", "bad"))
        await eventually(lambda: engine.adapters == {"one"})
        assert files.scheduler.pool(files.spec).engine is engine
        await files.scheduler.close(0)

    asyncio.run(run())


def test_adapter_of_a_cold_pool_is_checked_before_it_is_taken() -> None:
    """Else the next boot would fail of it."""

    async def run() -> None:
        files = Reloaded(entry())
        assert files.scheduler.pool(files.spec).state == "cold"
        files.machine.bad = "bad"
        with pytest.raises(WeightsError):
            await files.reload(entry("bad"))
        await files.reload(entry("one"))
        assert (await files.ready()).adapters == {"one"}
        await files.scheduler.close(0)

    asyncio.run(run())


def test_adapters_that_change_while_the_pool_wakes_are_there_when_it_is_ready() -> None:
    """The boot goes on, and the reload does not wait for it."""

    async def run() -> None:
        files = Reloaded(entry("one"))
        files.machine.hold = True
        waking = asyncio.ensure_future(files.ready())
        await eventually(lambda: bool(files.machine.engines))
        (engine,) = files.machine.engines
        await eventually(lambda: files.scheduler.pool(files.spec).engine is engine)
        await files.reload(entry("two"))
        assert engine.adapters == {"one"}
        engine.may_start.set()
        await waking
        assert "two" in engine.adapters
        await eventually(lambda: engine.adapters == {"two"})
        await files.scheduler.close(0)
        assert len(files.machine.engines) == 1

    asyncio.run(run())


def test_adapter_that_is_refused_at_the_end_of_a_wake_leaves_the_engine_up(caplog: pytest.LogCaptureFixture) -> None:
    """The log says so; the model itself is served."""

    async def run() -> None:
        files = Reloaded(entry("one"))
        files.machine.hold = True
        waking = asyncio.ensure_future(files.ready())
        await eventually(lambda: bool(files.machine.engines))
        (engine,) = files.machine.engines
        await eventually(lambda: files.scheduler.pool(files.spec).engine is engine)
        engine.refuses = "two"
        await files.reload(entry("one", "two"))
        with caplog.at_level(logging.ERROR):
            engine.may_start.set()
            await waking
        assert engine.adapters == {"one"}
        assert "served without an adapter" in caplog.text
        await files.scheduler.close(0)

    asyncio.run(run())


@pytest.mark.parametrize(
    "changed",
    [
        entry("one", source="y"),
        entry("one", "two", "three", "four", room=4),
        entry("one", max_model_len=4096),
        entry("two", "three", "four"),
    ],
)
def test_change_that_the_engine_cannot_follow_gets_another_engine(changed: ModelSpec) -> None:
    """Another source of an adapter, more than it has room for, or another field: the old one ends when idle."""

    async def run() -> None:
        files = Reloaded(entry("one"))
        before = await files.ready()
        await files.reload(changed)
        assert files.scheduler.pool(changed).engine is None
        after = await files.ready()
        assert after is not before
        assert after.adapters == {adapter.name for adapter in changed.adapters}
        await files.scheduler.close(0)

    asyncio.run(run())
