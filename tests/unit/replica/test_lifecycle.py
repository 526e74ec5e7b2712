"""A replica's lifecycle against the fake engine: prepare, (checkpoint), start, stop."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.engine.process import State
from service.engine.shutdown import MODAL_SHUTDOWN
from service.errors import EngineError, EngineTimeoutError, GpuCountError
from service.hardware import Hardware, probe
from service.replica import lifecycle
from service.replica.lifecycle import Replica
from service.replica.plan import Plan
from service.weights import store
from tests.unit.engines import eventually, group, scripted

Output = Callable[[], list[str]]


def test_replica_without_a_snapshot_prepares_weights_only(plan: Plan) -> None:
    """Nothing runs before `start`."""
    replica = Replica(plan)
    replica.prepare()

    assert [span.name for span in replica.phases.spans()] == ["weights"]
    assert replica.ready_after_s is None
    with pytest.raises(EngineError, match="no engine yet"):
        _ = replica.engine


def test_replica_under_a_cpu_snapshot_is_held_at_imported(plan: Plan) -> None:
    """The checkpoint is taken of a process that waits, with no socket open."""
    replica = Replica(scripted(plan, snapshot="cpu"))
    replica.prepare()
    try:
        assert replica.engine.state is State.IMPORTED
        assert psutil.Process(replica.engine.pid).net_connections() == []
        environ = psutil.Process(replica.engine.pid).environ()
        assert (environ["ENGINE_HOLD"], environ["ENGINE_IMPORTS"]) == ("imported", "neutral")
        replica.start()
        replica.engine.wait_for(State.READY, 0)
    finally:
        replica.stop()


def test_replica_started_has_a_span_for_each_phase(plan: Plan) -> None:
    """In seconds since the replica was asked for, in order, and all before it was ready."""
    replica = Replica(plan)
    replica.prepare()
    replica.start()
    replica.stop()
    spans = replica.phases.spans()

    assert [span.name for span in spans] == ["weights", "import", "import", "load", "canary", "ready"]
    assert replica.ready_after_s is not None
    for span in spans:
        assert 0 <= span.start <= span.end <= round(replica.ready_after_s, 3)


def test_replica_reports_its_phases_as_they_pass(plan: Plan) -> None:
    """By the names of the engine's own events; the local run shows them."""
    events: list[str] = []
    replica = Replica(plan, on_event=events.append)
    replica.prepare()
    replica.start()

    assert events == ["started", "imported", "building", "loaded", "canary", "opening", "ready"]
    replica.stop(0)


def test_replica_with_keys_makes_one_for_itself(plan: Plan, engine_output: Output) -> None:
    """`complete` needs a key where API clients do; it exists in this process only."""
    replica = Replica(plan)
    replica.prepare()
    replica.start({"ab" * 32: "alice"})
    replica.stop()

    assert replica.own_key is not None
    told = next(line for line in engine_output() if line.startswith("release "))
    assert "ab" * 32 in told
    assert hashlib.sha256(replica.own_key.encode()).hexdigest() in told
    assert replica.own_key not in told


def test_replica_without_keys_makes_none(plan: Plan, engine_output: Output) -> None:
    """Modal's proxy, or loopback, keeps others out."""
    replica = Replica(plan)
    replica.prepare()
    replica.start()
    replica.stop()

    assert replica.own_key is None
    assert '"digests": []' in next(line for line in engine_output() if line.startswith("release "))


@pytest.mark.parametrize("snapshot", ["off", "cpu", "gpu"])
def test_replica_whose_engine_dies_leaves_nothing(plan: Plan, snapshot: Any) -> None:
    """Modal runs no exit hook after a hook that raised."""
    script = {"die_at": "start", "code": 3, "grandchild": True}
    replica = Replica(scripted(plan, snapshot=snapshot, script=script))
    with pytest.raises(EngineError, match="code 3"):
        replica.prepare()
        replica.start()
    assert group(replica.engine.pid) == []
    replica.stop()


@pytest.mark.parametrize(
    ("snapshot", "step"),
    [("off", "loaded"), ("cpu", "start"), ("cpu", "loaded"), ("gpu", "loaded"), ("gpu", "opening")],
)
def test_replica_that_takes_too_long_is_ended(plan: Plan, snapshot: Any, step: str) -> None:
    """The time is the whole boot's; what hangs is killed."""
    script = {"hang_at": step, "ignore_sigterm": True, "grandchild": True}
    replica = Replica(scripted(plan, snapshot=snapshot, startup_timeout_s=0.5, script=script))
    with pytest.raises(EngineTimeoutError):
        replica.prepare()
        replica.start()

    assert replica.engine.state is State.STOPPED
    assert group(replica.engine.pid) == []


def test_replica_with_too_few_gpus_leaves_nothing(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused after the checkpoint, where GPUs are first seen; the held engine goes too."""
    monkeypatch.setenv("PATH", "/nowhere")
    replica = Replica(scripted(plan, snapshot="cpu", device="cuda", n_gpu=2))
    replica.prepare()
    with pytest.raises(GpuCountError, match="n_gpu=2"):
        replica.start()

    assert replica.engine.state is State.STOPPED


def test_replica_interrupted_leaves_nothing(plan: Plan) -> None:
    """Ctrl-C, and Modal's signal, come as KeyboardInterrupt in the middle of a wait."""

    def interrupt(event: str) -> None:
        if event == "building":
            os.kill(os.getpid(), signal.SIGINT)

    script = {"hang_at": "building", "ignore_sigterm": True, "grandchild": True}
    replica = Replica(scripted(plan, script=script), on_event=interrupt)
    replica.prepare()
    with pytest.raises(KeyboardInterrupt):
        replica.start()

    assert replica.engine.state is State.STOPPED
    assert group(replica.engine.pid) == []


def test_replica_whose_engine_dies_later_reports_it_once(plan: Plan) -> None:
    """`start` has returned: the one who serves learns it by a call."""
    deaths: list[EngineError] = []
    replica = Replica(plan, on_death=deaths.append)
    replica.prepare()
    replica.start()
    os.kill(replica.engine.pid, signal.SIGKILL)

    assert eventually(lambda: bool(deaths))
    replica.stop()
    assert ["SIGKILL" in str(death) for death in deaths] == [True]


def test_replica_whose_engine_hangs_reports_it_once(plan: Plan) -> None:
    """A hang is a death that had to be found."""
    deaths: list[EngineError] = []
    replica = Replica(scripted(plan, hang_s=3.0, script={"hang_at": "heartbeat"}), on_death=deaths.append)
    replica.prepare()
    replica.start()

    assert eventually(lambda: bool(deaths), 20)
    assert ["hung" in str(death) for death in deaths] == [True]
    replica.stop()


def test_replica_whose_engine_dies_before_it_is_ready_does_not_call_on_death(plan: Plan) -> None:
    """Before, `start` raises; who replaces replicas would do it twice."""
    deaths: list[EngineError] = []
    replica = Replica(scripted(plan, script={"die_at": "canary"}), on_death=deaths.append)
    replica.prepare()
    with pytest.raises(EngineError):
        replica.start()

    assert deaths == []


def test_replica_stop_is_idempotent_and_comes_any_time(plan: Plan) -> None:
    """Before there is an engine, and twice."""
    replica = Replica(plan)
    replica.stop()
    replica.prepare()
    replica.start()
    replica.stop()
    replica.stop()

    assert replica.engine.state is State.STOPPED


def test_replica_stop_gives_the_plans_grace(plan: Plan, engine_output: Output) -> None:
    """Modal gives less time than a terminal does."""
    replica = Replica(
        dataclasses.replace(plan, shutdown=dataclasses.replace(MODAL_SHUTDOWN, drain_s=7.0, cancel_s=0.5))
    )
    replica.prepare()
    replica.start()
    replica.stop()

    assert 'drain {"grace_s": 7.0, "cancel_s": 0.5}' in engine_output()


def test_replica_commits_weights_only_when_they_were_fetched(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume's commit is for news, and comes before the engine opens a file."""
    committed: list[str] = []
    Replica(plan, commit_weights=lambda: committed.append("found")).prepare()
    monkeypatch.setattr(store, "ensure", lambda *_: store.Weights(Path("/w"), fetched=True))
    Replica(plan, commit_weights=lambda: committed.append("fetched")).prepare()

    assert committed == ["fetched"]


@pytest.mark.parametrize(("snapshot", "before_the_checkpoint"), [("off", 0), ("cpu", 0), ("gpu", 1)])
def test_replica_probes_its_hardware_once_a_boot(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, snapshot: Any, before_the_checkpoint: int
) -> None:
    """Under a CPU snapshot after the restore, since no GPU is visible before; never where the plan has it."""
    found: list[Hardware] = []

    def counted() -> Hardware:
        found.append(probe())
        return found[-1]

    monkeypatch.setattr(lifecycle, "probe", counted)
    replica = Replica(scripted(plan, snapshot=snapshot))
    replica.prepare()
    try:
        assert len(found) == before_the_checkpoint
        replica.start()
    finally:
        replica.stop(0)
    assert len(found) == 1

    replica = Replica(scripted(plan, hardware=found[0]))
    replica.prepare()
    replica.start()
    replica.stop(0)
    assert len(found) == 1


def test_replica_logs_the_output_of_its_engine_with_the_model(plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    """Each line is a record of its own logger, whose handler can tell the models apart."""
    caplog.set_level(logging.INFO, "service.engine.output")
    replica = Replica(scripted(plan, script={"output": ["Loading weights 17% {}"]}))
    replica.prepare()
    replica.start()
    replica.stop(0)
    records = [record for record in caplog.records if record.name == "service.engine.output"]

    assert "Loading weights 17% {}" in [record.getMessage() for record in records]
    assert {getattr(record, "model", None) for record in records} == {"tiny"}
