"""The fake engine's own tests: it does what its script says and rejects what it does not know."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.engine.args import IN_ENGINE
from tests.unit.conftest import FAKE_ENGINE


class Piped:
    """A fake engine with both of its pipes in the test's hands."""

    def __init__(self, python: str, port: int, hold: str, script: dict[str, Any]) -> None:
        commands, self.commands = os.pipe()
        self.events, events = os.pipe()
        env = {"PYTHONPATH": str(IN_ENGINE), "ENGINE_PIPES": f"{commands},{events}", "ENGINE_HOLD": hold}
        env |= {"TMPDIR": script.pop("place")} if "place" in script else {}
        line = [python, "-m", "vllm_service.main", "--host", "127.0.0.1", "--port", str(port)]
        self.process = subprocess.Popen(
            line,
            env=env | {"VLLM_CPU_FAKE_ENGINE": json.dumps(script)},
            pass_fds=(commands, events),
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        os.close(commands)
        os.close(events)

    def close(self) -> str:
        """Close the commands' pipe, which ends the fake; return the rest of its output."""
        os.close(self.commands)
        output = self.process.communicate(timeout=10)[0].decode()
        os.close(self.events)
        return output

    def heard(self) -> list[str]:
        """Return the names of all events until the fake's end."""
        with os.fdopen(os.dup(self.events)) as events:
            return [json.loads(line)["event"] for line in events]


@pytest.fixture
def piped(fake_python: str, port: int) -> Iterator[Callable[..., Piped]]:
    """Return a function that starts the fake; it is gone after the test."""
    started: list[Piped] = []

    def start(hold: str = "", **script: Any) -> Piped:
        started.append(Piped(fake_python, port, hold, script))
        return started[-1]

    yield start
    for fake in started:
        if fake.process.poll() is None:
            os.killpg(fake.process.pid, signal.SIGKILL)
        fake.process.communicate(timeout=10)


def test_fake_engine_with_a_death_scripted_tells_the_steps_before_it(piped: Callable[..., Piped]) -> None:
    """The events up to the scripted step arrive, then it ends with the scripted code and lines."""
    fake = piped(die_at="canary", code=7, last_lines=["Boom"])

    assert fake.process.wait(10) == 7
    assert fake.heard() == ["started", "imported", "building", "loaded", "canary"]
    assert fake.close() == "Boom\n"


def test_fake_engine_with_a_fault_under_another_hold_only_goes_on(piped: Callable[..., Piped]) -> None:
    """Of two engines with one script, the one that sleeps and the cold one after it, one alone can be at fault."""
    fake = piped("imported", die_at="start", hang_at="start", only="asleep")
    with os.fdopen(os.dup(fake.events)) as events:
        assert [json.loads(events.readline())["event"] for _ in range(2)] == ["started", "imported"]
    fake.close()

    assert piped("asleep", die_at="start", code=9, only="asleep").process.wait(10) == 9


def test_fake_engine_that_listens_emits_heartbeats_and_ends_its_drain(piped: Callable[..., Piped]) -> None:
    """What the parent watches for, as the real one emits it: heartbeats, then the number of cancelled requests."""
    fake = piped("asleep", in_flight=True)
    os.write(fake.commands, b'{"command": "release", "digests": []}\n')
    with os.fdopen(os.dup(fake.events)) as events:
        told = (json.loads(line) for line in events)
        assert "heartbeat" in (event["event"] for event in told)
        os.write(fake.commands, b'{"command": "drain", "grace_s": 0.1, "cancel_s": 1}\n')
        assert next(event for event in told if event["event"] == "drained")["cancelled"] == 1

    assert 'drain {"grace_s": 0.1, "cancel_s": 1}' in fake.close()


def test_fake_engine_with_a_negative_code_dies_by_that_signal(piped: Callable[..., Piped]) -> None:
    """A negative code is a signal's number, as `subprocess` has it."""
    fake = piped(die_at="start", code=-signal.SIGABRT)

    assert fake.process.wait(10) == -signal.SIGABRT
    fake.close()


def test_fake_engine_when_its_parent_closes_the_pipe_is_killed(piped: Callable[..., Piped]) -> None:
    """The real ParentPipe is at work: the end of the pipe is the end of the group."""
    fake = piped(hang_at="imported")

    fake.close()

    assert fake.process.returncode == -signal.SIGKILL


def test_fake_engine_that_litters_leaves_a_socket_and_a_directory(piped: Callable[..., Piped], tmp_path: Path) -> None:
    """In the place for temporary files, as vLLM's processes do when they are killed."""
    place = tmp_path / "temporary"
    place.mkdir()
    fake = piped(die_at="building", temporary=True, place=str(place))
    fake.process.wait(10)
    fake.close()

    assert sorted(path.name.partition("-")[2] for path in place.iterdir()) == ["directory", "socket"]


@pytest.mark.parametrize(
    ("script", "hold", "named"),
    [
        ({"di_at": "start"}, "", "the key di_at"),
        ({"die_at": "lunch"}, "", "the step lunch"),
        ({"hang_at": "lunch"}, "", "the step lunch"),
        ({}, "sideways", "the hold sideways"),
        ({"only": "sideways"}, "", "the hold sideways"),
    ],
)
def test_fake_engine_asked_for_what_it_does_not_know_refuses(
    piped: Callable[..., Piped], script: dict[str, str], hold: str, named: str
) -> None:
    """A mistyped script must not pass for a healthy engine."""
    fake = piped(hold, **script)

    assert fake.process.wait(10) == 64
    assert named in fake.close()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-m", "vllm.main"],
        ["-m", "vllm_service.main", "--port", "1"],
        ["-m", "vllm_service.main", "--host", "h", "--port", "1", "--api-key", "x"],
    ],
)
def test_fake_engine_with_other_arguments_refuses(arguments: list[str]) -> None:
    """Only the program that it stands for can be asked of it."""
    line = [sys.executable, "-S", str(FAKE_ENGINE), *arguments]
    done = subprocess.run(line, env={"PYTHONPATH": str(IN_ENGINE)}, capture_output=True, timeout=10, check=False)

    assert done.returncode == 64


def test_fake_engine_without_pipes_refuses(fake_python: str) -> None:
    """Like the real program, it is nothing without its parent."""
    line = [fake_python, "-m", "vllm_service.main", "--host", "127.0.0.1", "--port", "1"]
    done = subprocess.run(line, env={"PYTHONPATH": str(IN_ENGINE)}, capture_output=True, timeout=10, check=False)

    assert (done.returncode, done.stdout) == (64, b"the fake engine does not know a start without pipes\n")
