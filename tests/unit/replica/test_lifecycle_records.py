"""What a boot leaves behind: its record, and what it compiled, each at the right time."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.boots import records
from service.engine.process import State
from service.errors import EngineError
from service.replica.compile_caches import Caches
from service.replica.lifecycle import Replica
from service.replica.plan import Plan
from tests.unit.engines import eventually, scripted

VERSIONS = {"vllm": "1.2.3"}


class Noted(Caches):
    """Caches that write each call into a list that is shared with others."""

    def __init__(self, local: Path, volume: Path, row: list[str]) -> None:
        super().__init__(local, VERSIONS, {"vllm": volume})
        self._row = row

    def load(self) -> int:
        """Load."""
        self._row.append("load")
        return super().load()

    def select_hardware(self, fingerprint: str) -> None:
        """Select."""
        self._row.append("select")
        super().select_hardware(fingerprint)

    def save(self) -> int:
        """Save."""
        self._row.append("save")
        return super().save()

    def env(self) -> Mapping[str, str]:  # type: ignore[override]
        """Lead the engine here."""
        self._row.append("env")
        return super().env()


@pytest.fixture
def row() -> list[str]:
    """Return what happened, in order."""
    return []


@pytest.fixture
def cached(plan: Plan, tmp_path: Path, row: list[str]) -> Plan:
    """Return a plan with caches that note what is asked of them."""
    return scripted(plan, caches=Noted(tmp_path / "local", tmp_path / "volume", row))


class Noting(Replica):
    """A replica that notes release, sleep and READY, its record, and its commits."""

    def __init__(self, plan: Plan, row: list[str]) -> None:
        self._row = row
        super().__init__(
            plan,
            on_event=lambda event: row.append(event) if event in {"asleep", "ready"} else None,
            on_record=lambda record: row.append(f"recorded {record.outcome}"),
            commit_caches=lambda: row.append("commit"),
        )

    def _release(self, accepted: list[str]) -> None:
        self._row.append("release")
        super()._release(accepted)


def boot(plan: Plan, **options: Any) -> Replica:
    """Bring up a replica and end it."""
    replica = Replica(plan, **options)
    try:
        replica.prepare()
        replica.start()
    finally:
        replica.stop(0)
    return replica


@pytest.mark.parametrize("snapshot", ["off", "cpu", "gpu"])
def test_boot_that_is_ready_keeps_its_record(plan: Plan, tmp_path: Path, snapshot: Any) -> None:
    """One file, of this boot's id, with what it was and how long it took; the same goes to `on_record`."""
    received: list[records.BootRecord] = []
    changes = {"snapshot": snapshot, "versions": VERSIONS, "records": tmp_path / "boots", "fast_boot": False}
    replica = boot(scripted(plan, **changes), on_record=received.append)
    kept = records.load(tmp_path / "boots")

    assert kept == received
    assert (kept[0].id, kept[0].model, kept[0].strategy, kept[0].gpu) == (replica.id, "tiny", snapshot, "cpu")
    assert (kept[0].outcome, kept[0].reason, kept[0].restored, kept[0].fast_boot) == ("ready", None, False, False)
    assert kept[0].versions == VERSIONS
    assert kept[0].phases[0].name == "weights"
    assert kept[0].phases[-1].name == "ready"
    assert kept[0].phases[-1].end <= kept[0].seconds
    assert kept[0].bytes_read is not None


def test_boot_cold_after_a_sleep_keeps_why(plan: Plan, tmp_path: Path) -> None:
    """One boot, one record, whatever it took."""
    boot(scripted(plan, snapshot="gpu", records=tmp_path / "boots", script={"different": True}))
    kept = records.load(tmp_path / "boots")

    assert [(record.outcome, "token 1 is 9" in str(record.reason)) for record in kept] == [("cold", True)]
    assert [span.name for span in kept[0].phases].count("load") == 2


@pytest.mark.parametrize("snapshot", ["off", "cpu", "gpu"])
def test_boot_that_fails_keeps_why(plan: Plan, tmp_path: Path, snapshot: Any) -> None:
    """With the phases it got through, before or after the checkpoint."""
    script = {"die_at": "loaded", "code": 3, "last_lines": ["so long"]}
    with pytest.raises(EngineError) as caught:
        boot(scripted(plan, snapshot=snapshot, records=tmp_path / "boots", script=script))
    kept = records.load(tmp_path / "boots")

    assert [(record.outcome, record.reason) for record in kept] == [("failed", str(caught.value))]
    assert "load" in [span.name for span in kept[0].phases]


def test_boot_that_is_interrupted_keeps_that(plan: Plan, tmp_path: Path) -> None:
    """An interrupt has no text of its own."""

    def interrupt(event: str) -> None:
        if event == "building":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        boot(scripted(plan, records=tmp_path / "boots", script={"hang_at": "building"}), on_event=interrupt)

    assert [(r.outcome, r.reason) for r in records.load(tmp_path / "boots")] == [("failed", "KeyboardInterrupt")]


def test_boot_whose_record_cannot_be_kept_is_ready(plan: Plan, tmp_path: Path) -> None:
    """A full disk must not keep a replica from serving."""
    (tmp_path / "boots").write_text("in the way")
    received: list[records.BootRecord] = []
    boot(scripted(plan, records=tmp_path / "boots"), on_record=received.append)

    assert [record.outcome for record in received] == ["ready"]


def test_boot_without_a_snapshot_loads_its_caches_while_the_engine_imports(cached: Plan, row: list[str]) -> None:
    """Selected before the spawn, loaded before the release; saved once it serves, and at the end once more."""
    replica = Noting(cached, row)
    replica.prepare()
    assert row == []
    replica.start()
    assert eventually(lambda: "commit" in row)
    replica.stop()

    assert row[:4] == ["select", "env", "load", "release"]
    assert row[4:] == ["ready", "recorded ready", "save", "commit", "save"]


def test_boot_from_a_cpu_snapshot_selects_its_caches_before_the_release(cached: Plan, row: list[str]) -> None:
    """The GPU is seen only after the checkpoint, and the engine reads no cache before the release."""
    replica = Noting(scripted(cached, snapshot="cpu"), row)
    replica.prepare()
    assert row == ["load", "env"]
    replica.start()
    assert eventually(lambda: "commit" in row)
    replica.stop(0)

    assert row[2:] == ["select", "load", "release", "ready", "recorded ready", "save", "commit"]


def test_boot_from_a_gpu_snapshot_saves_caches_only_once_it_is_awake(cached: Plan, row: list[str]) -> None:
    """A checkpoint that sees a volume's file open cannot be restored."""
    replica = Noting(scripted(cached, snapshot="gpu"), row)
    replica.prepare()
    assert row == ["select", "load", "env", "asleep"]
    replica.start()
    assert eventually(lambda: "commit" in row)
    replica.stop(0)

    assert row[4:] == ["release", "ready", "recorded ready", "save", "commit"]


def test_boot_restored_from_a_gpu_snapshot_saves_no_caches(cached: Plan, row: list[str]) -> None:
    """What its snapshot compiled was saved by the replica that took the snapshot."""
    replica = Noting(scripted(cached, snapshot="gpu"), row)
    replica.prepare()
    replica.start(restored=True)
    assert eventually(lambda: "commit" in row)
    replica.stop(0)

    assert row[4:] == ["release", "ready", "recorded ready", "commit"]


def test_boot_that_fails_commits_its_record_alone(cached: Plan, row: list[str]) -> None:
    """What half a boot compiled may be half written; why it failed is worth keeping."""
    replica = Noting(scripted(cached, script={"die_at": "canary"}), row)
    replica.prepare()
    with pytest.raises(EngineError):
        replica.start()
    replica.stop()

    assert row[-2:] == ["recorded failed", "commit"]
    assert "save" not in row


def test_boot_with_caches_leads_the_engine_to_them(cached: Plan, tmp_path: Path) -> None:
    """And to no others, whatever the parent's environment says."""
    plan = scripted(cached, snapshot="cpu")
    replica = Replica(plan)
    replica.prepare()
    try:
        environ = psutil.Process(replica.engine.pid).environ()
        assert replica.engine.state is State.IMPORTED
        assert environ["VLLM_CACHE_ROOT"].startswith(str(tmp_path / "local"))
    finally:
        replica.stop(0)


def test_boot_saves_what_the_engine_compiled(cached: Plan, tmp_path: Path, row: list[str]) -> None:
    """An archive on the volume, from the place that the engine was led to."""
    replica = Noting(cached, row)
    replica.prepare()
    assert cached.caches is not None
    made = Path(cached.caches.env()["VLLM_CACHE_ROOT"])

    def compile_(event: str) -> None:
        if event == "loaded":
            (made / "kernel").write_text("compiled")
            os.utime(made / "kernel", (0, 0))  # long done: what may still be being written stays

    replica._on_event = compile_
    replica.start()
    assert eventually(lambda: "commit" in row)
    replica.stop(0)

    assert [path for path in (tmp_path / "volume").rglob("*") if path.is_file()] != []
