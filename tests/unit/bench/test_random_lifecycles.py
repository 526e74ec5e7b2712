"""Random lifecycles of fake engines: whatever fails, the outcome is READY or a reported error, and nothing is left.

Each lifecycle has its own seed, which a failure names. They run in threads, most of which wait at any time; each has an
address of its own in 127/8, so ports do not conflict. Nothing depends on the speed of the machine: an engine without a
fault gets as long as it needs. `make soak` runs 500 of each kind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from service.engine.args import IN_ENGINE, EngineCommand
from service.engine.process import EngineProcess, State
from service.errors import EngineError
from service.replica.lifecycle import Replica
from service.replica.plan import Plan
from tests.unit.engines import READY_S, eventually, group, open_files, scripted
from tests.unit.fake_engine import HOLDS, STEPS

AT_ONCE = 16
HANGS_S = 0.3  # time limit of a boot that hangs; a boot without a fault gets READY_S
PORT = 20011  # below the kernel's ephemeral ports
EVENTS = (
    "started",
    "imported",
    "building",
    "loaded",
    "warmed",
    "canary",
    "asleep",
    "awake",
    "woken",
    "opening",
    "ready",
)
ENDS = {State.STOPPED, State.FAILED}


class Lifecycles:
    """Runs lifecycles and checks afterwards that nothing is left.

    Args:
        place: Directory for the temporary files of all engines and of this process.
        count: How many to run.
    """

    def __init__(self, place: Path, count: int) -> None:
        self.place, self._count = place, count
        self.failures: list[str] = []
        self.outcomes: dict[str, int] = {}

    def run(self, lifecycle: Callable[[random.Random, str], str], first: int) -> None:
        """Run all of them, AT_ONCE at a time, and assert that nothing is left."""
        lifecycle(_chance(first), self._address(0))  # opens what a process opens once
        self._clean("the first")
        files, threads = open_files(), threading.active_count()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda number: self._one(lifecycle, first + number, number), range(self._count)))
        self._clean("all of them")
        assert self.failures == []
        assert eventually(lambda: open_files() <= files, READY_S), f"{open_files()} descriptors, {files} before"
        assert eventually(lambda: threading.active_count() <= threads, READY_S), threading.enumerate()

    def _one(self, lifecycle: Callable[[random.Random, str], str], seed: int, number: int) -> None:
        try:
            outcome = lifecycle(_chance(seed), self._address(number + 1))
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        except BaseException as error:  # noqa: BLE001 - reported with its seed
            self.failures.append(f"SEED={seed}: {error!r}")

    def _address(self, number: int) -> str:
        """Return a loopback address that no other lifecycle uses, and hardly another run of the tests."""
        return f"127.{1 + os.getpid() % 250}.{number // 250}.{1 + number % 250}"

    def _clean(self, after: str) -> None:
        processes = [path.parent.name for path in Path("/proc").glob("[0-9]*/environ") if self._leads_here(path)]
        assert processes == [], f"processes after {after}: {processes}"
        files = [str(path.relative_to(self.place)) for path in self.place.rglob("*")]
        assert files == [], f"files after {after}: {files}"

    def _leads_here(self, environ: Path) -> bool:
        """Tell whether a process, or an ancestor of it, got the directory in its environment."""
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            return str(self.place).encode() in environ.read_bytes()
        return False


@pytest.fixture
def lifecycles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Lifecycles:
    """Return the runner; temporary files of this process and of the engines go to its directory."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return Lifecycles(place, request.config.getoption("--lifecycles"))


def _exists(pgid: int) -> bool:
    try:
        os.killpg(pgid, 0)
    except ProcessLookupError:
        return False
    return True


def _chance(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - reproducible, not secret


def fault(chance: random.Random) -> dict[str, Any]:
    """Return a script for the fake engine; half of all have no fault."""
    script: dict[str, Any] = {"temporary": True}
    if chance.random() < 0.3:
        script["ignore_sigterm"] = True
    if chance.random() < 0.2:
        script["in_flight"] = True
    if chance.random() < 0.1:
        script["grandchild"] = True
    if chance.random() < 0.5:
        return script
    kind = chance.choice(["die_at", "die_at", "hang_at", "different"])
    if kind == "different":
        return {**script, "different": True}
    if kind == "die_at":
        script["code"] = chance.choice([0, 1, 139, -signal.SIGKILL, -signal.SIGSEGV])
    if chance.random() < 0.4:
        script["only"] = chance.choice(HOLDS)
    return {**script, kind: chance.choice(STEPS)}


def faulty(script: dict[str, Any]) -> bool:
    """Tell whether the script has a fault before the end."""
    return bool({"die_at", "hang_at"} & set(script))


def assert_ended(engine: EngineProcess) -> None:
    """Assert that an engine and its whole process group have ended."""
    assert engine.state in ENDS, engine.state
    assert not _exists(engine.pid) or group(engine.pid) == []


@pytest.mark.parametrize("first", [1_000_000])
def test_replica_in_random_lifecycles_is_ready_or_reports_why_and_leaves_nothing(
    plan: Plan, lifecycles: Lifecycles, first: int
) -> None:
    """Every strategy, with engines that work, never get ready, ignore signals, or die at any step."""
    plan = dataclasses.replace(plan, port=PORT, parent_env={**plan.parent_env, "TMPDIR": str(lifecycles.place)})

    def lifecycle(chance: random.Random, address: str) -> str:
        script, snapshot = fault(chance), chance.choice(["off", "cpu", "gpu"])
        limits: dict[str, Any] = {"startup_timeout_s": READY_S, "wake_timeout_s": READY_S}
        if "hang_at" in script:
            limits = {"startup_timeout_s": HANGS_S * 2, "wake_timeout_s": HANGS_S}
        outcomes: list[str] = []
        replica = Watched(scripted(plan, script=script, host=address, snapshot=snapshot, **limits), outcomes)
        try:
            replica.prepare()
            replica.start(restored=chance.random() < 0.5)
        except EngineError as error:
            assert str(error)
            assert faulty(script), f"{error} of {script}"
            assert outcomes == ["failed"]
        else:
            assert outcomes in (["ready"], ["cold"])
            assert (outcomes == ["cold"]) <= (snapshot == "gpu" and (faulty(script) or "different" in script))
        finally:
            replica.stop(chance.choice([0, 0.01, 0.05]))
        for engine in replica.engines:
            assert_ended(engine)
        return outcomes[0]

    lifecycles.run(lifecycle, first)
    assert set(lifecycles.outcomes) == {"ready", "cold", "failed"}


@pytest.mark.parametrize("first", [2_000_000])
def test_engine_in_random_lifecycles_killed_at_any_phase_reports_it_and_leaves_nothing(
    fake_python: str, lifecycles: Lifecycles, first: int
) -> None:
    """The engine is killed or stopped, with any hold, at any phase or in the middle of one."""

    def lifecycle(chance: random.Random, address: str) -> str:
        script, hold = fault(chance), chance.choice(HOLDS)
        env = {"PYTHONPATH": str(IN_ENGINE), "PATH": os.defpath, "TMPDIR": str(lifecycles.place)}
        env["VLLM_CPU_FAKE_ENGINE"] = json.dumps(script)
        command = EngineCommand(("--host", address, "--port", str(PORT)), env, address, PORT)
        phase, late_s = chance.choice(EVENTS), chance.choice([0, 0, chance.random() * 0.05])
        due, deaths = threading.Event(), list[EngineError]()
        engine = EngineProcess(
            command,
            python=fake_python,
            hold=hold,  # type: ignore[arg-type]
            on_event=lambda name, _: due.set() if name == phase else None,
            on_death=deaths.append,
        )
        engine.spawn()
        if chance.random() < 0.8:
            engine.release()
        due.wait(HANGS_S)
        time.sleep(late_s)
        was_stopped = end(chance, engine)
        assert engine.wait_ended(READY_S)
        assert_ended(engine)
        with pytest.raises(EngineError):
            engine.wait_for(State.READY, 0)
        if engine.state is State.FAILED:
            assert eventually(lambda: len(deaths) == 1)
        elif not was_stopped:
            raise AssertionError(f"the engine was killed, and its state is {engine.state}")
        return engine.state.name

    lifecycles.run(lifecycle, first)
    assert set(lifecycles.outcomes) == {"STOPPED", "FAILED"}


def end(chance: random.Random, engine: EngineProcess) -> bool:
    """End an engine in one of many ways; tell whether its supervisor stopped it."""
    way = chance.choice(["kill", "kill group", "stopped", "stop", "stop slowly", "two stops"])
    if way in {"kill", "kill group"}:
        with contextlib.suppress(ProcessLookupError):
            (os.kill if way == "kill" else os.killpg)(engine.pid, signal.SIGKILL)
        return False
    if way == "stopped":
        with contextlib.suppress(ProcessLookupError):
            os.kill(engine.pid, signal.SIGSTOP)
    if way == "two stops":
        other = threading.Thread(target=engine.stop, args=(0.05,))
        other.start()
        engine.stop(chance.choice([0, 0.05]))
        other.join()
    else:
        engine.stop(0.02 if way == "stop slowly" else 0)
    return True


class Watched(Replica):
    """A replica that keeps all of its engines."""

    def __init__(self, plan: Plan, outcomes: list[str]) -> None:
        super().__init__(plan, on_record=lambda record: outcomes.append(record.outcome), on_event=self._see)
        self.engines: list[EngineProcess] = []

    def _see(self, event: str) -> None:
        if event == "started":
            self.engines.append(self.engine)
