"""How an engine ends: asked to, by itself, or with its parent. Afterwards nothing of it is left, and it is said why."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import http.client
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.engine.args import EngineCommand
from service.engine.process import EngineProcess, State
from service.errors import EngineError
from tests.unit.engines import READY_S, eventually, group, open_files

Start = Callable[..., EngineProcess]
Command = Callable[..., EngineCommand]
TRACEBACK = ["Traceback (most recent call last):", '  File "x.py", line 1, in f', "ValueError: no such parser"]


@pytest.fixture
def start(fake_command: Command, fake_python: str) -> Iterator[Start]:
    """Return a function that spawns an engine from a script and brings it to a state; it is stopped after the test."""
    engines: list[EngineProcess] = []

    def spawn(until: State = State.READY, on_death: Any = None, **script: Any) -> EngineProcess:
        engine = EngineProcess(fake_command(**script), python=fake_python, on_death=on_death)
        engines.append(engine)
        engine.spawn()
        engine.release()
        engine.wait_for(until, READY_S)
        return engine

    yield spawn
    for engine in engines:
        engine.stop(0)


def ask_to_die(engine: EngineProcess, code: int) -> None:
    """Have a listening fake end with this code."""
    connection = http.client.HTTPConnection("127.0.0.1", engine.command.port, timeout=5)
    connection.request("GET", f"/die?{code}")
    connection.close()


@contextlib.contextmanager
def orphans_come_here() -> Iterator[None]:
    """Make this process the parent of orphaned descendants, as a container's first process is."""
    set_child_subreaper = 36
    libc = ctypes.CDLL(None)
    assert libc.prctl(set_child_subreaper, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        libc.prctl(set_child_subreaper, 0, 0, 0, 0)


def test_kill_of_an_engine_that_listens_no_more_tells_the_cause(start: Start) -> None:
    """It counts as the engine's own death: nothing that was asked to stop has a cause."""
    reported: list[EngineError] = []
    engine = start(on_death=reported.append)

    cause = engine.kill()

    assert (engine.state, group(engine.pid)) == (State.FAILED, [])
    assert "was killed by SIGKILL" in str(cause)
    assert eventually(lambda: reported == [cause])


def test_stop_lets_the_engine_end_by_itself(start: Start) -> None:
    """The command is enough for a healthy engine, and what it leaves is STOPPED, not FAILED."""
    engine = start()
    engine.stop(10)

    assert engine.state is State.STOPPED
    assert group(engine.pid) == []
    with pytest.raises(EngineError, match="was stopped"):
        engine.wait_for(State.READY, 0)


def test_stop_ends_a_grandchild_that_ignores_sigterm(start: Start) -> None:
    """VLLM's workers are members of the group; none may outlive the leader."""
    engine = start(grandchild=True)
    assert len(group(engine.pid)) == 2
    engine.stop(10)

    assert group(engine.pid) == []


def test_stop_calls_no_on_death(start: Start) -> None:
    """An end that was asked for is no death."""
    deaths: list[EngineError] = []
    engine = start(on_death=deaths.append)
    engine.stop(10)

    assert not eventually(lambda: bool(deaths), 0.1)


@pytest.mark.parametrize(
    ("step", "code", "said"),
    [
        ("start", 1, "exited with code 1"),
        ("imported", 2, "exited with code 2"),
        ("loaded", 0, "exited with code 0"),  # never a success
        ("canary", 139, "exited with code 139"),
        ("listening", 3, "exited with code 3"),
        ("imported", -signal.SIGKILL, "SIGKILL"),
        ("canary", -signal.SIGSEGV, "SIGSEGV"),
    ],
)
def test_death_before_ready_raises_with_code_and_time(start: Start, step: str, code: int, said: str) -> None:
    """Whatever the code, an engine that ends unasked has failed, and the sentence says how and when."""
    with pytest.raises(EngineError) as caught:
        start(die_at=step, code=code)

    assert said in str(caught.value)
    assert "before it was ready" in str(caught.value)


def test_death_with_a_traceback_names_its_root(start: Start) -> None:
    """The cause is the exception, not the line that the process wrote last."""
    with pytest.raises(EngineError, match=r"code 1 .*Cause: 'ValueError: no such parser'"):
        start(die_at="loaded", code=1, last_lines=[*TRACEBACK, "Shutting down."])


def test_death_without_a_traceback_names_the_last_line(start: Start) -> None:
    """Where there is no exception the last words are the best that there is."""
    with pytest.raises(EngineError, match="Last line: 'so long'"):
        start(die_at="loaded", code=5, last_lines=["so long"])


def test_death_after_ready_calls_on_death_once_with_the_reason(start: Start) -> None:
    """`on_death` is called with the root cause, and later waits raise the same error."""
    deaths: list[EngineError] = []
    engine = start(on_death=deaths.append, last_lines=TRACEBACK)
    ask_to_die(engine, 9)

    assert engine.wait_ended(5)
    assert eventually(lambda: bool(deaths))
    assert engine.state is State.FAILED
    assert "code 9" in str(deaths[0])
    assert "after it was ready" in str(deaths[0])
    assert "no such parser" in str(deaths[0])
    with pytest.raises(EngineError, match="code 9"):
        engine.wait_for(State.READY, 0)
    engine.stop(1)
    assert len(deaths) == 1


def test_death_with_code_zero_after_ready_is_a_death(start: Start) -> None:
    """VLLM's server leaves with code 0 when its engine core was killed."""
    deaths: list[EngineError] = []
    engine = start(on_death=deaths.append)
    ask_to_die(engine, 0)

    assert eventually(lambda: bool(deaths))
    assert "code 0" in str(deaths[0])


def test_death_by_kill_is_reported_within_a_second(start: Start) -> None:
    """`kill -9` of the engine: noticed by its end, not by a poll. The quickest of three, as a machine may be busy."""
    took_s = []
    for _ in range(3):
        engine = start()
        began = time.monotonic()
        os.kill(engine.pid, signal.SIGKILL)
        assert engine.wait_ended(10)
        took_s.append(time.monotonic() - began)

    assert min(took_s) < 1
    with pytest.raises(EngineError, match="killed by SIGKILL"):
        engine.wait_for(State.READY, 0)


def test_death_of_the_leader_ends_its_grandchild(start: Start) -> None:
    """A worker that the leader left behind would hold the GPU."""
    engine = start(grandchild=True)
    os.kill(engine.pid, signal.SIGKILL)

    assert engine.wait_ended(5)
    assert group(engine.pid) == []


def test_death_in_a_container_leaves_no_zombie_and_is_reported_at_once(start: Start) -> None:
    """The service may be a container's first process, which inherits the orphans: a dead worker is reaped."""
    engine = start(grandchild=True)
    grandchild = next(pid for pid in group(engine.pid) if pid != engine.pid)
    with orphans_come_here():
        began = time.monotonic()
        os.kill(engine.pid, signal.SIGKILL)
        assert engine.wait_ended(10)
        took_s = time.monotonic() - began

        assert took_s < 4.5
        assert not psutil.pid_exists(grandchild)


@pytest.mark.parametrize("end", ["stop", "kill", "spawn"])
def test_engine_that_ended_leaves_no_socket_and_no_temporary_directory(
    fake_command: Command, fake_python: str, tmp_path: Path, end: str
) -> None:
    """A killed vLLM removes nothing; a machine that serves for months must not fill up with it."""
    place = tmp_path / "temporary"
    place.mkdir()
    command = fake_command(temporary=True)
    command = dataclasses.replace(command, env={**command.env, "TMPDIR": str(place)})
    engine = EngineProcess(command, python=fake_python if end != "spawn" else "/nowhere/python")
    with contextlib.suppress(EngineError):
        engine.spawn()
        engine.release()
        engine.wait_for(State.READY, READY_S)
        if end == "kill":
            os.kill(engine.pid, signal.SIGKILL)
        engine.stop(10)
        assert engine.wait_ended(READY_S)

    assert list(place.iterdir()) == []


def test_engine_over_20_cycles_leaks_no_file_and_no_thread(fake_command: Command, fake_python: str) -> None:
    """Stops and deaths alike give back every descriptor and thread."""

    def cycle(number: int) -> None:
        engine = EngineProcess(fake_command(**({"die_at": "imported"} if number % 2 else {})), python=fake_python)
        engine.spawn()
        engine.release()
        if number % 2 == 0:
            engine.wait_for(State.READY, READY_S)
            engine.stop(5)
        assert engine.wait_ended(READY_S)

    cycle(0)
    files, threads = open_files(), threading.active_count()
    for number in range(20):
        cycle(number)

    assert eventually(lambda: open_files() <= files), f"{open_files()} descriptors, {files} before"
    assert eventually(lambda: threading.active_count() <= threads)


def test_parent_killed_takes_the_engine_with_it(fake_python: str, fake_command: Command) -> None:
    """`kill -9` of the parent leaves no time for anything: the engine sees its pipe end and kills its own group."""
    command = fake_command(ignore_sigterm=True, grandchild=True)
    program = (
        "import time\nfrom service.engine.process import EngineProcess, State\n"
        "from service.engine.args import EngineCommand\n"
        f"engine = EngineProcess(EngineCommand({command.argv!r}, {dict(command.env)!r}, '127.0.0.1', {command.port}), "
        f"python={fake_python!r})\n"
        "engine.spawn(); engine.release(); engine.wait_for(State.READY, 20)\n"
        "print(engine.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
    assert parent.stdout is not None
    pgid = int(parent.stdout.readline())
    try:
        assert len(group(pgid)) == 2
        parent.kill()
        parent.communicate(timeout=5)

        assert eventually(lambda: group(pgid) == [], 5)
    finally:
        if group(pgid):
            os.killpg(pgid, signal.SIGKILL)
