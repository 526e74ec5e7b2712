"""The GPU strategy on Modal's real entrypoint and the real engine: asleep in the snapshot, woken, verified, replaced.

There is no GPU here: vLLM's scheduler sleeps, memory stays. What a broken restore does to memory is done by hand.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
from modal._runtime.gpu_memory_snapshot import SNAPSHOT_RESTORE_FAILED_EXIT_CODE

from tests.contract.conftest import answers_right, deployed, engine_leader, pool_of, record_of, tasks_of
from tests.contract.memory import overwrite
from tests.fakes.modal import ContainerRuntime, ModalPlane, TaskState

FROZEN_S = 1.5


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory, engine_runtime: ContainerRuntime) -> Iterator[ModalPlane]:
    """A plane with the tier deployed under GPU snapshots."""
    settings = {"SERVICE_SNAPSHOT": "gpu", "SERVICE_FAST_BOOT": "1"}
    with deployed(tmp_path_factory.mktemp("plane"), engine_runtime, **settings) as plane:
        yield plane


@contextmanager
def _before_restore(plane: ModalPlane, change: Callable[[Any], None]) -> Iterator[None]:
    """Change the frozen container before its restore."""
    plane.snapshots.before_restore.append(change)
    yield
    plane.snapshots.before_restore.remove(change)


def test_gpu_snapshot_holds_a_sleeping_engine_that_wakes_and_answers(
    plane: ModalPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the checkpoint the engine is built and has no port; later it answers, and its record counts from the restore.

    The clocks have gone on meanwhile: nobody takes that for time that the boot took, or for an engine that hung.
    """
    seen: list[tuple[str, list[Any], float]] = []

    def look(task: Any) -> None:
        listening = [c for pid in task.members() for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"]
        seen.append((task.log, listening, time.time()))

    monkeypatch.setattr(plane.snapshots, "freeze_s", FROZEN_S)
    with _before_restore(plane, look):
        answers_right(pool_of(plane, "tiny"))

    (task,) = tasks_of(plane, "tiny")
    ((log, listening, thawed_at),) = seen
    assert "Loading weights took" in log, "the engine was built before the checkpoint"
    assert listening == []
    record = record_of(task)
    assert (record.strategy, record.outcome, record.restored) == ("gpu", "ready", True)
    assert record.when.timestamp() > thawed_at - 0.001, "to the millisecond"
    assert record.seconds < task.ready_at - thawed_at
    assert max(span.end for span in record.phases if span.end <= 0) < -FROZEN_S, "it fell asleep before"
    assert "hung" not in task.log
    names = [span.name for span in record.phases if span.start >= 0]
    assert names == ["wake", "canary", "ready"]
    assert {"import", "load", "warm-up", "canary", "sleep"} <= {span.name for span in record.phases if span.end <= 0}
    volume = plane.volumes["vllm-cache"]
    kept = f"boots/{record.id}.json"
    plane.wait_until(lambda: kept in volume.files(), 10, "the record in the committed volume")
    assert json.loads(volume.read(kept))["id"] == record.id


def test_restore_with_wrong_memory_boots_cold_in_the_same_hook(plane: ModalPlane, tiny_norm: bytes) -> None:
    """The engine wakes and would generate nonsense: its canary differs, and a cold boot serves the request."""

    def break_memory(task: Any) -> None:
        assert sum(overwrite(pid, tiny_norm, bytes(len(tiny_norm))) for pid in task.members()) > 0

    with _before_restore(plane, break_memory):
        answers_right(pool_of(plane, "TINY"))

    (task,) = tasks_of(plane, "TINY")
    record = record_of(task)
    assert record.outcome == "cold"
    assert "The engine did not wake as it fell asleep: in its canary " in str(record.reason)
    assert f"boot {record.id}: the engine did not wake as it fell asleep, so it is booted cold." in task.log
    assert engine_leader(task).is_running(), "the engine that woke wrong is gone: there is one"


def test_restore_with_a_dead_engine_boots_cold_in_the_same_hook(plane: ModalPlane) -> None:
    """An engine that did not survive its sleep costs a boot, not the request."""
    with _before_restore(plane, lambda task: engine_leader(task).send_signal(signal.SIGKILL)):
        answers_right(pool_of(plane, "llm"))

    (task,) = tasks_of(plane, "llm")
    record = record_of(task)
    assert record.outcome == "cold"
    assert "SIGKILL" in str(record.reason)


def test_sleeping_replica_that_is_lost_leaves_nothing_and_is_replaced(plane: ModalPlane) -> None:
    """Preempted at its restore, or without its GPU memory there, a container ends; the request is served by the next.

    After a preemption that one is restored as usual, after a failed restore it boots without a snapshot.
    """
    lost: list[Any] = []

    def lose(task: Any) -> None:
        lost.append(task)
        if len(lost) == 1:
            task.preempt(grace_s=10)
        else:
            plane.snapshots.fail_next_gpu_restore()

    with _before_restore(plane, lose):
        answers_right(pool_of(plane, "Tiny"))
    preempted, forgetful, last = tasks_of(plane, "Tiny")
    assert lost == [preempted, forgetful]
    plane.wait_until(lambda: all(task.state is TaskState.DEAD for task in lost), 20, "both containers' end")
    assert not any(task.left_behind for task in lost)
    assert forgetful.exit_code == SNAPSHOT_RESTORE_FAILED_EXIT_CODE
    record = record_of(last)
    assert (record.outcome, record.restored) == ("ready", False)
