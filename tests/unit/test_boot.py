"""A replica's life against the fake engine: prepare, (checkpoint), start, stop."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.boot import Plan, Replica
from service.engine import State
from service.errors import EngineError, EngineTimeoutError, GpuCountError
from service.models import Registry

TINY = Registry.load().specs["tiny"]


@pytest.fixture
def plan(fake_python: str, port: int) -> Iterator[Plan]:
    """Return the plan of a replica with the fake engine; no process is left after the test."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield Plan(TINY, "tiny", "cpu", fake_python, {"PATH": os.defpath}, port=port, startup_timeout_s=20)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def scripted(plan: Plan, **changes: Any) -> Plan:
    """Return the plan with changes; `script` is the fake engine's."""
    script = changes.pop("script", "{}")
    return dataclasses.replace(plan, parent_env={**plan.parent_env, "FAKE_ENGINE": script}, **changes)


def test_replica_without_a_snapshot_prepares_weights_only(plan: Plan) -> None:
    """Nothing runs before `start`."""
    replica = Replica(plan)
    replica.prepare()

    assert list(replica.phases) == ["weights"]
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
        assert replica.engine.state is State.READY
    finally:
        replica.stop()


def test_replica_started_has_a_time_for_each_phase(plan: Plan) -> None:
    """Seconds since the replica began, in order."""
    replica = Replica(plan)
    replica.prepare()
    replica.start()
    replica.stop()

    assert list(replica.phases) == ["weights", "spawned", "started", "imported", "loaded", "canary", "ready"]
    assert list(replica.phases.values()) == sorted(replica.phases.values())


def test_replica_with_keys_makes_one_for_itself(plan: Plan) -> None:
    """`complete` needs a key where strangers do; it lives in this process only."""
    lines: list[str] = []
    replica = Replica(plan, on_line=lines.append)
    replica.prepare()
    replica.start({"alice": "ab" * 32})
    replica.stop()

    assert replica.own_key is not None
    told = next(line for line in lines if line.startswith("release "))
    assert "ab" * 32 in told
    assert hashlib.sha256(replica.own_key.encode()).hexdigest() in told
    assert replica.own_key not in told


def test_replica_without_keys_makes_none(plan: Plan) -> None:
    """Modal's proxy, or loopback, keeps strangers out."""
    lines: list[str] = []
    replica = Replica(plan, on_line=lines.append)
    replica.prepare()
    replica.start()
    replica.stop()

    assert replica.own_key is None
    assert '"digests": []' in next(line for line in lines if line.startswith("release "))


@pytest.mark.parametrize("snapshot", ["off", "cpu"])
def test_replica_whose_engine_dies_leaves_nothing(plan: Plan, snapshot: Any) -> None:
    """Modal runs no exit hook after a hook that raised."""
    replica = Replica(scripted(plan, snapshot=snapshot, script='{"die_at": "start", "code": 3, "grandchild": true}'))
    with pytest.raises(EngineError, match="code 3"):
        replica.prepare()
        replica.start()
    replica.stop()


@pytest.mark.parametrize(("snapshot", "step"), [("off", "loaded"), ("cpu", "start"), ("cpu", "loaded")])
def test_replica_that_takes_too_long_is_ended(plan: Plan, snapshot: Any, step: str) -> None:
    """The time is the whole boot's; what hangs is killed."""
    script = f'{{"hang_at": "{step}", "ignore_sigterm": true}}'
    replica = Replica(scripted(plan, snapshot=snapshot, startup_timeout_s=0.5, script=script))
    with pytest.raises(EngineTimeoutError):
        replica.prepare()
        replica.start()

    assert replica.engine.state is State.STOPPED


def test_replica_with_too_few_gpus_leaves_nothing(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused after the checkpoint, where GPUs are first seen; the held engine goes too."""
    monkeypatch.setenv("PATH", "/nowhere")
    replica = Replica(scripted(plan, snapshot="cpu", device="cuda", n_gpu=2))
    replica.prepare()
    with pytest.raises(GpuCountError, match="n_gpu=2"):
        replica.start()

    assert replica.engine.state is State.STOPPED


def test_replica_stop_is_idempotent_and_comes_any_time(plan: Plan) -> None:
    """Before there is an engine, and twice."""
    replica = Replica(plan)
    replica.stop()
    replica.prepare()
    replica.start()
    replica.stop()
    replica.stop()

    assert replica.engine.state is State.STOPPED


def test_replica_shares_weights_only_when_they_were_fetched(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume's commit is for news, and comes before the engine opens a file."""
    from service import weights

    shared: list[str] = []
    Replica(plan).prepare(share=lambda: shared.append("found"))
    monkeypatch.setattr(weights, "ensure", lambda *_: weights.Weights(Path("/w"), fetched=True))
    Replica(plan).prepare(share=lambda: shared.append("fetched"))

    assert shared == ["fetched"]


def test_plan_shows_no_token(plan: Plan) -> None:
    """A plan may stand in a log."""
    assert "hf_secret" not in repr(dataclasses.replace(plan, hub_token="hf_secret"))
