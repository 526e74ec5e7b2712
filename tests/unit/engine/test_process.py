"""EngineProcess against the fake engine: states, holds, waits, and the error of each wait that fails."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.engine.args import EngineCommand
from service.engine.process import EngineProcess, State
from service.errors import EngineError, EngineTimeoutError
from tests.unit.engines import READY_S, eventually, open_links

Start = Callable[..., EngineProcess]
Command = Callable[..., EngineCommand]


@pytest.fixture
def start(fake_command: Command, fake_python: str) -> Iterator[Start]:
    """Return a function that spawns an engine from a script; it is stopped after the test."""
    engines: list[EngineProcess] = []

    def spawn(hold: Any = "", on_event: Any = None, **script: Any) -> EngineProcess:
        engine = EngineProcess(fake_command(**script), python=fake_python, hold=hold, on_event=on_event)
        engines.append(engine)
        engine.spawn()
        return engine

    yield spawn
    for engine in engines:
        engine.stop(0)


def released(engine: EngineProcess) -> dict[str, Any]:
    """Return what the fake engine received with its release."""
    lines = lambda: [line for line in engine.log.lines if line.startswith("release ")]  # noqa: E731
    assert eventually(lambda: bool(lines()))
    return dict(json.loads(lines()[0].removeprefix("release ")))


def test_engine_without_hold_gets_ready_and_reports_each_step(start: Start) -> None:
    """A release that comes early is kept until the engine asks for it."""
    events: list[str] = []
    engine = start(on_event=lambda name, _: events.append(name))
    engine.release()

    engine.wait_for(State.READY, READY_S)

    assert engine.state is State.READY
    assert events == ["started", "imported", "building", "loaded", "canary", "opening", "ready"]


def test_engine_events_carry_times_in_order(start: Start) -> None:
    """Every event has `at` on the parent's own monotonic clock."""
    before = time.monotonic()
    times: list[float] = []
    engine = start(on_event=lambda _, fields: times.append(fields["at"]))
    engine.release()
    engine.wait_for(State.READY, READY_S)

    row = [before, *times, time.monotonic()]
    assert row == sorted(row)


def test_engine_ready_reports_no_heartbeat(start: Start) -> None:
    """Heartbeats are for the supervisor only: they are no events of the boot."""
    events: list[str] = []
    engine = start(on_event=lambda name, _: events.append(name))
    engine.release()
    engine.wait_for(State.READY, READY_S)
    time.sleep(0.2)  # four heartbeats of the fake

    assert events[-1] == "ready"


def test_engine_with_another_canary_after_waking_never_gets_ready(start: Start) -> None:
    """The canary after the sleep must be the one before it; else the engine is killed, whatever it does itself."""
    engine = start("asleep", different=True)
    engine.wait_for(State.ASLEEP, READY_S)
    engine.release()

    with pytest.raises(EngineError, match="did not wake as it fell asleep: in its canary token 1 is 9"):
        engine.wait_for(State.READY, READY_S)


@pytest.mark.parametrize(("hold", "held_at"), [("imported", State.IMPORTED), ("asleep", State.ASLEEP)])
def test_engine_held_stays_until_the_release(start: Start, hold: str, held_at: State) -> None:
    """The hold is not left by itself, and no port is open while it lasts."""
    engine = start(hold)
    engine.wait_for(held_at, READY_S)

    with pytest.raises(EngineTimeoutError, match=f"not READY after 0 s, it got to {held_at.name}"):
        engine.wait_for(State.READY, 0.15)
    assert psutil.Process(engine.pid).net_connections() == []

    engine.release()
    engine.wait_for(State.READY, READY_S)
    assert engine.state is State.READY


def test_engine_asleep_reports_the_canary_before_and_after(start: Start) -> None:
    """READY comes only after the engine has woken, not with the canary before the sleep."""
    events: list[str] = []
    engine = start("asleep", on_event=lambda name, _: events.append(name))
    engine.wait_for(State.ASLEEP, READY_S)
    assert events == ["started", "imported", "building", "loaded", "warmed", "canary", "asleep"]

    engine.release()
    engine.wait_for(State.READY, READY_S)

    assert events[7:] == ["awake", "woken", "opening", "ready"]


def test_engine_release_sends_digests_by_pipe_only(start: Start) -> None:
    """What the engine accepts as keys is in no argument and no variable."""
    engine = start()
    engine.release(["ab" * 32])
    engine.wait_for(State.READY, READY_S)

    assert released(engine)["digests"] == ["ab" * 32]
    process = psutil.Process(engine.pid)
    assert "ab" * 32 not in " ".join(process.cmdline()) + str(process.environ())


def test_engine_release_after_its_end_raises_nothing(start: Start) -> None:
    """The error belongs to `wait_for`, which knows the reason."""
    engine = start(die_at="start")
    engine.wait_ended(READY_S)

    engine.release(["ab" * 32])


def test_engine_release_without_keys_says_so(start: Start) -> None:
    """No keys are sent as an empty list, which the guard distinguishes from no release."""
    engine = start()
    engine.release()
    engine.wait_for(State.READY, READY_S)

    assert released(engine)["digests"] == []


def test_engine_health_not_yet_200_is_asked_again(start: Start) -> None:
    """Only 200 is readiness: neither 503 nor something that is no HTTP."""
    engine = start(health=[503, 500])
    engine.release()
    engine.wait_for(State.READY, READY_S)

    assert engine.state is State.READY


def test_engine_port_that_answers_no_http_is_asked_again(start: Start) -> None:
    """An answer that is no HTTP must not end the thread that waits for the port."""
    engine = start(health=["garbage"])
    engine.release()
    engine.wait_for(State.READY, READY_S)

    assert engine.state is State.READY


def test_engine_wait_that_times_out_names_state_last_line_and_remedy(start: Start) -> None:
    """The sentence says how far it got, what it last wrote, and which setting gives it longer."""
    engine = start(output=["Loading weights 17%"], hang_at="imported")
    engine.wait_for(State.IMPORTED, READY_S)

    with pytest.raises(EngineTimeoutError) as caught:
        engine.wait_for(State.READY, 0.1)

    for part in ("READY", "IMPORTED", "'Loading weights 17%'", "SERVICE_STARTUP_TIMEOUT_S"):
        assert part in str(caught.value)


def test_engine_wait_for_a_passed_state_returns_at_once(start: Start) -> None:
    """Waiting is for "at least this far"."""
    engine = start()
    engine.release()
    engine.wait_for(State.READY, READY_S)

    engine.wait_for(State.IMPORTED, 0)
    engine.wait_for(State.ASLEEP, 0)


def test_engine_stopped_during_a_wait_raises_in_the_waiting_thread(start: Start) -> None:
    """A waiter does not sit out its time when another thread stops the engine."""
    engine = start("imported")
    engine.wait_for(State.IMPORTED, READY_S)
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            engine.wait_for(State.READY, READY_S)
        except EngineError as error:
            caught.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    engine.stop(5)
    waiter.join(5)

    assert "was stopped" in str(caught[0])


def test_engine_wait_ended_returns_whether_it_ended(start: Start) -> None:
    """False after the timeout, True after the end."""
    engine = start("imported")
    assert engine.wait_ended(0.05) is False

    engine.stop(5)

    assert engine.wait_ended(0) is True


def test_engine_spawned_has_its_own_session_and_no_terminal(start: Start) -> None:
    """Ctrl-C reaches the parent only: the parent decides when and how the engine ends."""
    engine = start("imported")
    engine.wait_for(State.IMPORTED, READY_S)

    assert os.getsid(engine.pid) == os.getpgid(engine.pid) == engine.pid
    assert Path(f"/proc/{engine.pid}/fd/0").resolve() == Path("/dev/null")


def test_engine_spawned_finds_the_tools_of_its_environment_first(start: Start, fake_python: str) -> None:
    """Kernels are compiled at run time with ninja, which lies beside the interpreter."""
    engine = start("imported")
    engine.wait_for(State.IMPORTED, READY_S)

    assert psutil.Process(engine.pid).environ()["PATH"].split(os.pathsep)[0] == str(Path(fake_python).parent)


def test_engine_spawn_with_no_interpreter_raises_engine_error_and_leaks_nothing(
    fake_command: Command, tmp_path: Path
) -> None:
    """A deleted environment is an error in words, with the path, and no pipe stays open."""
    missing = str(tmp_path / "gone" / "python")
    before = open_links()

    with pytest.raises(EngineError, match=missing):
        EngineProcess(fake_command(), python=missing).spawn()

    assert not {link for link in open_links() - before if link.startswith("pipe:")}


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_engine_on_every_address_is_asked_on_loopback(
    fake_command: Command, fake_python: str, start: Start, host: str
) -> None:
    """The address to listen on is not one to connect to."""
    command = dataclasses.replace(fake_command(), host=host)
    engine = EngineProcess(command, python=fake_python)
    engine.spawn()
    try:
        engine.release()
        engine.wait_for(State.READY, READY_S)
    finally:
        engine.stop(0)
