"""A boot that cannot work is recorded, and the next one ends before its engine is built; one that served is not."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from service.boots.failures import FailureFile
from service.engine.process import State
from service.errors import EngineError, RecordedFailureError
from service.hardware import Hardware
from service.replica.lifecycle import Replica
from service.replica.plan import Plan
from tests.unit.engines import eventually, group, scripted

FLAG = "vllm serve: error: unrecognized arguments: --no-such-flag"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the failure is recorded."""
    return tmp_path / "volume" / "failures" / "tiny.json"


def with_file(plan: Plan, file: Path, **changes: Any) -> Plan:
    """Return the plan with a record of its failure."""
    return scripted(plan, failure=FailureFile(file, lambda: "boot"), **changes)


def boot(plan: Plan, **calls: Any) -> Replica:
    """Return a replica that was started."""
    replica = Replica(plan, **calls)
    replica.prepare()
    replica.start()
    return replica


@pytest.mark.parametrize("snapshot", ["off", "cpu", "gpu"])
def test_boot_that_cannot_work_is_recorded_and_not_repeated(plan: Plan, file: Path, snapshot: Any) -> None:
    """It is visible to other replicas before the hook ends; the next boot fails with the reason, and builds nothing."""
    commits: list[bool] = []
    script = {"die_at": "start", "code": 2, "last_lines": [FLAG]}
    failing = with_file(plan, file, snapshot=snapshot, script=script, hardware=None)
    with pytest.raises(EngineError, match="--no-such-flag"):
        boot(failing, commit_caches=lambda: commits.append(file.exists()))
    assert commits == [True]
    written = file.read_bytes()

    replica = Replica(with_file(plan, file, snapshot=snapshot))
    with pytest.raises(RecordedFailureError, match=r"--no-such-flag'\..*so none was begun now"):
        replica.prepare()
        replica.start()
    assert replica._engine is None or replica.engine.state is State.STOPPED
    assert file.read_bytes() == written, "a refusal renews nothing"


def test_boot_that_works_removes_the_record_of_another(plan: Plan, file: Path) -> None:
    """What failed was another image, or other arguments."""
    FailureFile(file, lambda: "before").save("tiny", "", EngineError("No."))
    replica = boot(with_file(plan, file))
    replica.stop()
    assert not file.exists()


def test_engine_that_dies_while_it_serves_is_not_recorded_and_is_lost_first(plan: Plan, file: Path) -> None:
    """Whatever its log says: requests write there. That it is lost is told before the reason is found out."""
    told: list[str] = []
    plan = with_file(plan, file, script={"output": [FLAG]})
    replica = boot(plan, on_lost=lambda: told.append("lost"), on_death=lambda error: told.append(str(error)))
    os.kill(replica.engine.pid, signal.SIGKILL)
    assert eventually(lambda: len(told) == 2)
    assert told[0] == "lost"
    assert "SIGKILL" in told[1]
    assert group(replica.engine.pid) == []
    replica.stop()
    assert not file.exists()


def test_boot_that_is_interrupted_is_not_recorded(plan: Plan, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modal may preempt a container amid its boot."""

    def interrupted(_: object) -> Hardware:
        raise KeyboardInterrupt

    monkeypatch.setattr(Replica, "_probe_hardware", interrupted)
    with pytest.raises(KeyboardInterrupt):
        boot(with_file(plan, file))
    assert not file.exists()
