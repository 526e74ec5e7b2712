"""A replica under a GPU snapshot: asleep before the checkpoint, awake after it, or booted cold in the same start."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from service.boots.records import BootRecord
from service.engine.process import EngineProcess, State
from service.errors import EngineError, GpuCountError
from service.replica.lifecycle import Replica
from service.replica.plan import Plan
from tests.unit.engines import READY_S, eventually, group, scripted

Warnings = Callable[[], list[str]]


class Watched(Replica):
    """A replica that keeps its warnings, events and records, and the engine that it put to sleep."""

    def __init__(self, plan: Plan) -> None:
        self.events: list[str] = []
        self.deaths: list[EngineError] = []
        self.records: list[BootRecord] = []
        super().__init__(
            plan,
            on_event=self.events.append,
            on_death=self.deaths.append,
            on_record=self.records.append,
        )

    def prepare(self) -> None:
        """Prepare, and keep the engine."""
        super().prepare()
        self.sleeper: EngineProcess = self.engine

    def assert_booted_cold(self, reason: str, warnings: list[str]) -> None:
        """Assert that another engine is READY, the first has ended, and the reason was logged."""
        assert self.engine is not self.sleeper
        self.engine.wait_for(State.READY, 0)
        assert group(self.sleeper.pid) == []
        assert reason in warnings[0]
        assert f"boot {self.id}: " in warnings[0]
        assert [(record.outcome, reason in str(record.reason)) for record in self.records] == [("cold", True)]
        assert self.deaths == []


def asleep(plan: Plan, **changes: Any) -> Watched:
    """Return a replica that has gone to sleep."""
    replica = Watched(scripted(plan, snapshot="gpu", **changes))
    replica.prepare()
    return replica


def test_replica_under_a_gpu_snapshot_is_held_asleep_with_no_port(plan: Plan) -> None:
    """The engine is built, warmed up and has its canary before the checkpoint; it has no open socket and no key."""
    replica = asleep(plan)
    try:
        assert replica.engine.state is State.ASLEEP
        assert psutil.Process(replica.engine.pid).net_connections() == []
        assert psutil.Process(replica.engine.pid).environ()["ENGINE_HOLD"] == "asleep"
        assert replica.events == ["started", "imported", "building", "loaded", "warmed", "canary", "asleep"]
        assert not [line for line in replica.engine.log.lines if line.startswith("release")]
        assert replica.records == []
    finally:
        replica.stop()


def test_replica_that_wakes_is_ready_with_the_same_engine(plan: Plan, warnings: Warnings) -> None:
    """Nothing is imported or loaded a second time."""
    replica = asleep(plan)
    replica.start()
    try:
        assert replica.engine is replica.sleeper
        replica.engine.wait_for(State.READY, 0)
        assert replica.events[7:] == ["awake", "woken", "opening", "ready"]
        assert [(record.outcome, record.reason) for record in replica.records] == [("ready", None)]
        assert warnings() == []
    finally:
        replica.stop()


def test_replica_that_wakes_as_another_is_booted_cold(plan: Plan, warnings: Warnings) -> None:
    """An engine whose memory was restored wrong must never serve a request."""
    replica = asleep(plan, script={"different": True, "grandchild": True})
    replica.start()
    try:
        replica.assert_booted_cold("token 1 is 9 instead of 1", warnings())
        assert "opening" not in replica.events[: replica.events.index("started", 1)]
        assert psutil.Process(replica.engine.pid).environ()["ENGINE_HOLD"] == "imported"
    finally:
        replica.stop()


def test_replica_that_does_not_wake_in_time_is_booted_cold(plan: Plan, warnings: Warnings) -> None:
    """A wake that hangs costs its time-out, and no more."""
    script = {"hang_at": "awake", "ignore_sigterm": True, "grandchild": True}
    replica = asleep(plan, wake_timeout_s=0.5, script=script)
    replica.start()
    try:
        replica.assert_booted_cold("did not wake within 0.5 s", warnings())
    finally:
        replica.stop(0)


def test_replica_whose_engine_died_asleep_is_booted_cold(plan: Plan, warnings: Warnings) -> None:
    """What a restore did not bring back at all is found at once."""
    replica = asleep(plan, script={"grandchild": True})
    os.kill(replica.engine.pid, signal.SIGKILL)
    replica.start()
    try:
        replica.assert_booted_cold("SIGKILL", warnings())
    finally:
        replica.stop()


@pytest.mark.parametrize("step", ["awake", "woken", "opening", "listening"])
def test_replica_whose_engine_dies_while_it_wakes_is_booted_cold(plan: Plan, step: str, warnings: Warnings) -> None:
    """At any step until it is ready."""
    replica = asleep(plan, script={"die_at": step, "code": 7, "only": "asleep"})
    replica.start()
    try:
        replica.assert_booted_cold("code 7", warnings())
    finally:
        replica.stop()


def test_replica_booted_cold_and_dead_later_reports_it(plan: Plan) -> None:
    """The second engine is watched as the first would have been."""
    replica = asleep(plan, script={"different": True})
    replica.start()
    os.kill(replica.engine.pid, signal.SIGKILL)

    assert eventually(lambda: bool(replica.deaths))
    replica.stop()
    assert ["SIGKILL" in str(death) for death in replica.deaths] == [True]


def test_replica_whose_cold_boot_fails_as_well_leaves_nothing(plan: Plan) -> None:
    """The second failure is raised, and both engines have ended."""
    script = {"different": True, "die_at": "building", "code": 5, "only": "imported", "grandchild": True}
    replica = asleep(plan, script=script)
    with pytest.raises(EngineError, match="code 5"):
        replica.start()

    assert replica.engine is not replica.sleeper
    assert group(replica.sleeper.pid) + group(replica.engine.pid) == []
    assert replica.deaths == []
    assert [(record.outcome, "code 5" in str(record.reason)) for record in replica.records] == [("failed", True)]


@pytest.mark.parametrize("wake_timeout_s", [0.2, 60])
def test_replica_that_wakes_and_boots_too_slowly_ends_within_the_boots_time(plan: Plan, wake_timeout_s: float) -> None:
    """Waking gets half of what is left at most, and the cold boot the rest."""
    replica = asleep(plan)  # a start that a busy machine may take its time for
    replica.stop(0)
    script = {"hang_at": "opening", "ignore_sigterm": True}
    replica = asleep(plan, script=script, startup_timeout_s=4, wake_timeout_s=wake_timeout_s)
    began = time.monotonic()
    with pytest.raises(EngineError, match="not READY"):
        replica.start(restored=True)

    assert 4 <= time.monotonic() - began < 10
    assert replica.events.count("started") == 2


def test_replica_that_wakes_in_the_moment_it_is_given_up_is_not_taken_for_ready(plan: Plan) -> None:
    """When the cold engine fails, too, that is an error of `start` and no death of an engine that served."""
    replica = asleep(plan, wake_timeout_s=0.5, script={"die_at": "building", "code": 5, "only": "imported"})

    def see(event: str) -> None:
        if event == "ready":
            replica.sleeper.wait_ended(
                READY_S
            )  # the engine has reported its failure, which the replica has not read yet

    replica._on_event = see
    with pytest.raises(EngineError, match="code 5"):
        replica.start()

    assert replica.ready_after_s is None
    assert replica.deaths == []


def test_replica_restored_has_spans_before_zero(plan: Plan) -> None:
    """What the snapshot holds was paid by an earlier replica; what came after counts from the restore."""
    replica = asleep(plan)
    before = replica.id
    time.sleep(0.01)  # spans have a resolution of a millisecond
    replica.start(restored=True)
    replica.stop()
    record = replica.records[0]
    paid = {span.name for span in record.phases if span.start < 0}
    own = {span.name for span in record.phases if span.start >= 0}

    assert paid == {"weights", "import", "load", "warm-up", "canary", "sleep"}
    assert own == {"wake", "canary", "ready"}
    assert all(span.end <= 0 for span in record.phases if span.start < 0)
    assert (record.restored, record.id == replica.id, replica.id == before) == (True, True, False)


def test_replica_not_restored_records_how_long_the_checkpoint_took(plan: Plan) -> None:
    """The first replica takes the snapshot itself, between its two hooks."""
    replica = asleep(plan)
    time.sleep(0.1)
    replica.start()
    replica.stop()
    spans = {span.name: span for span in replica.records[0].phases}

    assert not replica.records[0].restored
    assert spans["restore"].end - spans["restore"].start >= 0.099  # rounded to milliseconds
    assert all(span.start >= 0 for span in spans.values())


def test_replica_booted_cold_has_the_phases_of_both_engines(plan: Plan) -> None:
    """The record shows what was lost and what it cost."""
    replica = asleep(plan, script={"different": True})
    time.sleep(0.01)
    replica.start(restored=True)
    replica.stop()
    loads = [span for span in replica.records[0].phases if span.name == "load"]

    assert [load.start < 0 for load in loads] == [True, False]


def test_replica_of_several_gpus_is_refused_a_gpu_snapshot(plan: Plan) -> None:
    """Before anything is started, and with what to do instead."""
    replica = Watched(scripted(plan, snapshot="gpu", n_gpu=2))
    with pytest.raises(GpuCountError, match=r"'tiny' is to run on 2.*SERVICE_SNAPSHOT=cpu"):
        replica.prepare()

    assert replica.events == []
    assert [record.outcome for record in replica.records] == ["failed"]


def test_replica_asleep_on_a_gpu_gets_the_sleep_flag_and_the_cold_one_does_not(plan: Plan) -> None:
    """Sleep mode takes memory and time that an engine which never sleeps need not pay."""
    replica = asleep(plan, device="cuda", script={"different": True})
    argv = replica.sleeper.command.argv
    try:
        with pytest.raises(GpuCountError):  # there is none here: refused while the cold one boots
            replica.start()
    finally:
        replica.stop(0)

    assert "--enable-sleep-mode" in argv
    assert "--enable-sleep-mode" not in replica.engine.command.argv
