"""The GPU strategy on Modal's real entrypoint and the real engine: asleep in the snapshot, woken, verified, replaced.

There is no GPU here: vLLM's scheduler sleeps, memory stays. What a broken restore does to memory is done by hand.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from service.records import BootRecord
from tests.contract.conftest import call, deploy, engine_leader, pool_of, tasks_of
from tests.contract.memory import overwrite
from tests.engine.dialogues import QUESTION
from tests.fakes.modal import ContainerRuntime, ModalPlane, TaskState

CHAT = "/v1/chat/completions"
BOOT_S = 150


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory, engine_runtime: ContainerRuntime) -> Iterator[ModalPlane]:
    """A plane with the tier deployed under GPU snapshots."""
    with ModalPlane(tmp_path_factory.mktemp("plane"), container=engine_runtime) as plane:
        deploy(plane, SERVICE_MODEL="tiny", SERVICE_SNAPSHOT="gpu", SERVICE_FAST_BOOT="1")
        yield plane
        assert plane.failures == []
        assert plane.unknown_calls == []


def _record(task: Any) -> BootRecord:
    """Return the record of a container's boot from its log."""
    lines = [line for line in task.log.splitlines() if line.startswith("boot {")]
    return BootRecord.from_line(lines[-1].removeprefix("boot "))


def _answers(pool: Any) -> None:
    status, answer = pool.complete.remote(CHAT, {"model": "llm", **QUESTION})
    assert status == 200, answer
    assert "Paris" in answer["choices"][0]["message"]["content"]


@contextmanager
def _before_restore(plane: ModalPlane, change: Callable[[Any], None]) -> Iterator[None]:
    """Do something to the frozen container of the next restore."""
    plane.snapshots.before_restore.append(change)
    yield
    plane.snapshots.before_restore.remove(change)


def test_gpu_snapshot_holds_an_engine_that_sleeps_and_wakes_right(plane: ModalPlane) -> None:
    """At the checkpoint the engine is built and has no port; afterwards it answers, and the boot is on record."""
    seen: list[tuple[str, list[Any]]] = []

    def look(task: Any) -> None:
        listening = [c for pid in task.members() for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"]
        seen.append((task.log, listening))

    with _before_restore(plane, look):
        _answers(pool_of(plane, "tiny"))

    (task,) = tasks_of(plane, "tiny")
    ((log, listening),) = seen
    assert "Loading weights took" in log, "the engine was built before the checkpoint"
    assert listening == []
    record = _record(task)
    assert (record.strategy, record.outcome, record.restored) == ("gpu", "ready", True)
    assert record.seconds < 5
    names = [span.name for span in record.phases if span.start >= 0]
    assert names == ["wake", "canary", "ready"]
    assert {"import", "load", "warm-up", "canary", "sleep"} <= {span.name for span in record.phases if span.end <= 0}
    volume = plane.volumes["vllm-cache"]
    kept = f"boots/{record.id}.json"
    plane.wait_until(lambda: kept in volume.files(), 10, "the record in the committed volume")
    assert json.loads(volume.read(kept))["id"] == record.id


def test_restore_with_wrong_memory_boots_cold_in_the_same_hook(plane: ModalPlane, tiny_norm: bytes) -> None:
    """The engine wakes and would talk nonsense: its canary gives it away, and the request is served right."""

    def break_memory(task: Any) -> None:
        assert sum(overwrite(pid, tiny_norm, bytes(len(tiny_norm))) for pid in task.members()) > 0

    with _before_restore(plane, break_memory):
        _answers(pool_of(plane, "TINY"))

    (task,) = tasks_of(plane, "TINY")
    record = _record(task)
    assert record.outcome == "cold"
    assert "The engine woke as another: in its canary " in str(record.reason)
    assert f"boot {record.id}: the engine did not wake as it fell asleep, so it is booted cold." in task.log
    assert engine_leader(task).is_running(), "the engine that woke wrong is gone: there is one"


def test_restore_with_a_dead_engine_boots_cold_in_the_same_hook(plane: ModalPlane) -> None:
    """An engine that did not survive its sleep costs a boot, not the request."""
    with _before_restore(plane, lambda task: engine_leader(task).send_signal(signal.SIGKILL)):
        _answers(pool_of(plane, "llm"))

    (task,) = tasks_of(plane, "llm")
    record = _record(task)
    assert record.outcome == "cold"
    assert "SIGKILL" in str(record.reason)


def test_restore_whose_gpu_memory_is_lost_boots_a_fresh_replica(plane: ModalPlane) -> None:
    """Modal ends such a container itself; the next one of the pool boots without the snapshot."""
    plane.snapshots.fail_next_gpu_restore()
    _answers(pool_of(plane, "Tiny"))
    first, second = tasks_of(plane, "Tiny")
    assert first.state is TaskState.DEAD
    assert not first.left_behind
    assert _record(second).outcome == "ready"


def test_preemption_of_a_sleeping_or_waking_engine_leaves_nothing(plane: ModalPlane) -> None:
    """SIGINT between checkpoint and readiness: both engine and container end within the grace, the next one serves."""
    pool = pool_of(plane, "tINY")
    first: list[Any] = []

    def preempt(task: Any) -> None:
        if not first:
            first.append(task)
            task.preempt(grace_s=10)

    with _before_restore(plane, preempt):
        assert pool.complete.remote("/health") == (200, {"status": "ok"})
    plane.wait_until(lambda: first[0].state is TaskState.DEAD, 12, "the container's end")
    assert not first[0].left_behind


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, engine_runtime: ContainerRuntime) -> Iterator[ModalPlane]:
    """A plane with the tier deployed without snapshots, whose engines may not be silent for long."""
    with ModalPlane(tmp_path_factory.mktemp("plain"), container=engine_runtime) as plane:
        deploy(plane, SERVICE_MODEL="tiny", SERVICE_SNAPSHOT="off", SERVICE_HANG_S="10")
        yield plane
        assert plane.snapshots.checkpoints == []
        assert plane.failures == []


def test_preemption_of_a_loading_engine_leaves_nothing(plain: ModalPlane) -> None:
    """SIGINT while the engine comes up in `start`: it is ended at once, and another replica serves the request."""
    pool = pool_of(plain, "TINY")
    running = pool.complete.spawn("/health")
    plain.wait_until(lambda: any("(EngineCore" in t.log for t in tasks_of(plain, "TINY")), 60, "the engine to load")
    (first,) = tasks_of(plain, "TINY")
    first.preempt(grace_s=10)
    plain.wait_until(lambda: first.state is TaskState.DEAD, 12, "the container's end")
    assert not first.left_behind
    assert _record(first).outcome == "failed"
    assert running.get(timeout=BOOT_S) == (200, {"status": "ok"})


def test_engine_that_hangs_after_ready_is_replaced(plain: ModalPlane) -> None:
    """`/health` stays green while the engine gives no token: it is noticed without a request, and replaced."""
    pool = pool_of(plain, "tiny")
    _answers(pool)
    (first,) = tasks_of(plain, "tiny")
    for core in engine_leader(first).children(recursive=True):
        core.suspend()
    token = plain.proxy_tokens.create()
    url = plain.url_of("vllm-l4", "Server", "serve")
    assert call(f"{url}/health?model=tiny", headers=token.headers)[0] == 200
    plain.wait_until(lambda: "engine died: The engine hung" in first.log, 60, "the hang's report")
    assert f"boot {_record(first).id}: engine died" in first.log
    plain.wait_until(lambda: first.state is TaskState.DEAD, 20, "the container's end")
    assert not first.left_behind
    _answers(pool)
