"""An engine that runs but hangs: the watchdog misses its heartbeat, kills it, and reports it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.engine.args import EngineCommand
from service.engine.process import EngineProcess, State
from service.engine.shutdown import MODAL_SHUTDOWN
from service.errors import EngineError
from tests.unit.engines import READY_S, eventually, group

ROOT = Path(__file__).parents[3]
Start = Callable[..., EngineProcess]
Command = Callable[..., EngineCommand]


@pytest.fixture
def deaths() -> list[EngineError]:
    """Return what `on_death` was called with."""
    return []


@pytest.fixture
def start(fake_command: Command, fake_python: str, deaths: list[EngineError]) -> Iterator[Start]:
    """Return a function that spawns an engine from a script and brings it to READY; it is stopped after the test."""
    engines: list[EngineProcess] = []

    def spawn(hang_s: float, hold: Any = "", **script: Any) -> EngineProcess:
        engine = EngineProcess(
            fake_command(**script), python=fake_python, hold=hold, hang_s=hang_s, on_death=deaths.append
        )
        engines.append(engine)
        engine.spawn()
        if hold:
            engine.wait_for(State.ASLEEP, READY_S)
        else:
            engine.release()
            engine.wait_for(State.READY, READY_S)
        return engine

    yield spawn
    for engine in engines:
        engine.stop(0)


def test_engine_without_a_heartbeat_is_killed_and_said_to_hang(start: Start, deaths: list[EngineError]) -> None:
    """Its port is open and /health is green all the while."""
    engine = start(3.0, hang_at="heartbeat", ignore_sigterm=True, grandchild=True)

    assert engine.wait_ended(READY_S)
    assert engine.state is State.FAILED
    assert group(engine.pid) == []
    with pytest.raises(EngineError, match=r"hung: it generated no token for 3 s.*SERVICE_HANG_S"):
        engine.wait_for(State.READY, 0)
    assert eventually(lambda: bool(deaths))
    engine.stop(1)
    assert [str(death)[:15] for death in deaths] == ["The engine hung"]


def test_engine_with_a_heartbeat_stays_ready(start: Start, deaths: list[EngineError]) -> None:
    """Longer than it could without one."""
    engine = start(4.0)
    engine.wait_ended(5.0)

    assert (engine.state, deaths) == (State.READY, [])


def test_engine_that_the_kernel_stopped_is_noticed(start: Start, deaths: list[EngineError]) -> None:
    """With SIGSTOP, or a driver that never returns, no process ends, and the hang is noticed all the same."""
    engine = start(3.0)
    os.kill(engine.pid, signal.SIGSTOP)

    assert engine.wait_ended(READY_S)
    assert eventually(lambda: bool(deaths))
    assert "hung" in str(deaths[0])


PARENT = """
import sys, threading
from service.engine.args import EngineCommand
from service.engine.process import EngineProcess, State

python, port, hang_s, *env = sys.argv[1:]
command = EngineCommand(("--host", "127.0.0.1", "--port", port), dict(zip(env[::2], env[1::2])), "127.0.0.1", int(port))
engine = EngineProcess(command, python=python, hang_s=float(hang_s))
engine.spawn()
engine.release()
engine.wait_for(State.READY, 20)
print(engine.pid, flush=True)
for line in sys.stdin:
    print("ended" if engine.wait_ended(float(line)) else "ready", flush=True)
engine.stop(0)
"""


@pytest.mark.parametrize("alone", [False, True], ids=["with its engine", "alone"])
def test_parent_that_was_paused_for_longer_than_the_limit_keeps_its_engine(
    fake_command: Command, fake_python: str, alone: bool
) -> None:
    """`docker pause` stops all processes; no heartbeat could come, and it comes again when all go on."""
    hang_s, command = 2.0, fake_command()
    env = [word for item in command.env.items() for word in item]
    arguments = [fake_python, str(command.port), str(hang_s), *env]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, *arguments], cwd=ROOT, stdin=pipe, stdout=pipe, text=True
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        engine_pid = int(parent.stdout.readline())
        pids = [parent.pid] if alone else [parent.pid, engine_pid]
        for number, pause_s in ((signal.SIGSTOP, hang_s + 0.5), (signal.SIGCONT, 0.0)):
            for pid in pids:
                os.kill(pid, number)
            time.sleep(pause_s)
        parent.stdin.write(f"{hang_s}\n")
        parent.stdin.close()
        assert parent.stdout.read().endswith("ready\n")
    assert parent.returncode == 0


def test_engine_asleep_needs_no_heartbeat(start: Start, deaths: list[EngineError]) -> None:
    """A snapshot may be restored days later; only an engine with an open port needs a heartbeat."""
    engine = start(0.05, "asleep")

    assert not engine.wait_ended(0.3)
    assert (engine.state, deaths) == (State.ASLEEP, [])


def test_stop_of_an_engine_that_hangs_comes_before_the_hang_is_noticed(start: Start, deaths: list[EngineError]) -> None:
    """The engine ends within the usual time, and `on_death` is not called."""
    engine = start(60, hang_at="heartbeat")
    os.kill(engine.pid, signal.SIGSTOP)
    began = time.monotonic()
    engine.stop(0.2)

    assert time.monotonic() - began < 0.2 + MODAL_SHUTDOWN.cancel_s + MODAL_SHUTDOWN.terminate_s + 2
    assert (engine.state, deaths) == (State.STOPPED, [])


def test_stop_while_the_patience_ends_is_an_end_that_was_asked_for(start: Start, deaths: list[EngineError]) -> None:
    """The stop waits longer than the engine may be silent; what was asked first counts."""
    engine = start(3.0, in_flight=True)
    os.kill(engine.pid, signal.SIGSTOP)
    engine.stop(4.0)

    assert (engine.state, deaths) == (State.STOPPED, [])
