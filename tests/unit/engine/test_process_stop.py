"""The end that was asked for: drain, terminate, kill, each in its time, whatever the engine does meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from service.engine.args import EngineCommand
from service.engine.process import EngineProcess, State
from service.engine.shutdown import MODAL_SHUTDOWN
from tests.unit.engines import READY_S, eventually, group

SLACK_S = 2.0  # of a busy machine
CANCEL_S, TERMINATE_S = MODAL_SHUTDOWN.cancel_s, MODAL_SHUTDOWN.terminate_s
GRACE_S = 30.0  # far more than any engine here needs
Start = Callable[..., EngineProcess]
Command = Callable[..., EngineCommand]


@pytest.fixture
def start(fake_command: Command, fake_python: str) -> Iterator[Start]:
    """Return a function that spawns an engine from a script and brings it to a state; it is stopped after the test."""
    engines: list[EngineProcess] = []

    def spawn(until: State = State.READY, hold: Any = "", on_event: Any = None, **script: Any) -> EngineProcess:
        engine = EngineProcess(fake_command(**script), python=fake_python, hold=hold, on_event=on_event)
        engines.append(engine)
        engine.spawn()
        if until is State.READY:
            engine.release()
        engine.wait_for(until, READY_S)
        return engine

    yield spawn
    for engine in engines:
        engine.stop(0)


def stop(engine: EngineProcess, grace_s: float) -> float:
    """Stop the engine, assert that it has ended as requested, and return the seconds that it took."""
    began = time.monotonic()
    engine.stop(grace_s)
    took_s = time.monotonic() - began
    assert engine.state is State.STOPPED
    assert group(engine.pid) == []
    return took_s


def drains(engine: EngineProcess) -> list[str]:
    """Return the words about a drain that the engine got."""
    return [line for line in engine.log.lines if line.startswith("drain ")]


def test_stop_sends_the_grace_to_the_engine(start: Start) -> None:
    """The engine refuses new requests and ends old ones; it must know until when."""
    engine = start()
    stop(engine, GRACE_S)

    assert drains(engine) == ['drain {"grace_s": 30.0, "cancel_s": 1.0}']


def test_stop_with_nothing_in_flight_returns_long_before_the_grace_is_over(start: Start) -> None:
    """The grace is for requests in flight; without any the stop does not wait."""
    assert stop(start(), GRACE_S) < GRACE_S / 4


def test_stop_with_a_request_in_flight_waits_for_the_grace_and_not_much_longer(start: Start) -> None:
    """A stream that never ends is cut by the engine when the grace is over."""
    took_s = stop(start(in_flight=True), 0.5)

    assert 0.5 <= took_s < 0.5 + CANCEL_S + TERMINATE_S + SLACK_S


def test_stop_without_a_grace_sends_no_drain(start: Start) -> None:
    """A failed boot and a second Ctrl-C end at once."""
    engine = start(in_flight=True, ignore_sigterm=True)

    assert stop(engine, 0) < TERMINATE_S
    assert drains(engine) == []


@pytest.mark.parametrize(("hold", "until"), [("imported", State.IMPORTED), ("asleep", State.ASLEEP)])
def test_stop_of_an_engine_that_is_not_ready_kills_it_at_once(start: Start, hold: str, until: State) -> None:
    """Nothing is in flight before there is a port."""
    engine = start(until, hold, ignore_sigterm=True, grandchild=True)

    assert stop(engine, GRACE_S) < TERMINATE_S
    assert drains(engine) == []


def test_stop_of_an_engine_that_ignores_sigterm_kills_it_in_time(start: Start) -> None:
    """It has said that it is drained, gets its moment to leave, and is killed."""
    took_s = stop(start(ignore_sigterm=True), GRACE_S)

    assert TERMINATE_S <= took_s < TERMINATE_S + SLACK_S


def test_stop_at_its_worst_takes_the_grace_and_the_time_to_terminate(start: Start) -> None:
    """A request that never ends, in an engine that ignores SIGTERM."""
    took_s = stop(start(in_flight=True, ignore_sigterm=True, grandchild=True), 0.3)

    assert took_s < 0.3 + CANCEL_S + TERMINATE_S + SLACK_S


def test_stop_of_an_engine_that_hears_nothing_takes_no_longer(start: Start) -> None:
    """A stopped process neither drains nor terminates; the grace bounds the wait for it."""
    engine = start()
    os.kill(engine.pid, signal.SIGSTOP)

    assert stop(engine, 0.3) < 0.3 + CANCEL_S + TERMINATE_S + SLACK_S


def test_stop_of_an_engine_that_dies_while_it_drains_is_no_failure(start: Start) -> None:
    """It was to end, and it did."""
    engine = start(in_flight=True)
    stopper = threading.Thread(target=engine.stop, args=(GRACE_S,))
    stopper.start()
    assert eventually(lambda: bool(drains(engine)))
    os.kill(engine.pid, signal.SIGKILL)
    stopper.join(GRACE_S / 2)

    assert not stopper.is_alive()
    assert engine.state is State.STOPPED


def test_stop_from_two_threads_ends_once(start: Start) -> None:
    """Ctrl-C during an exit hook is two stops at once."""
    engine = start()
    threads = [threading.Thread(target=engine.stop, args=(GRACE_S,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GRACE_S / 2)

    assert not any(thread.is_alive() for thread in threads)
    assert engine.state is State.STOPPED
    assert group(engine.pid) == []


def test_stop_without_a_grace_ends_one_that_waits(start: Start) -> None:
    """Who asks a second time does not want to wait for streams any more."""
    engine = start(in_flight=True)
    first = threading.Thread(target=engine.stop, args=(GRACE_S,))
    first.start()
    assert eventually(lambda: bool(drains(engine)))

    assert stop(engine, 0) < TERMINATE_S
    first.join(SLACK_S)
    assert not first.is_alive()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_engine_that_is_signalled_together_with_its_service_drains(start: Start, number: int) -> None:
    """Systemd signals every process of a service. The request in flight gets its grace, and the engine then ends."""
    engine = start(in_flight=True, grandchild=True)
    os.killpg(engine.pid, number)

    assert 0.5 <= stop(engine, 0.5) < 0.5 + TERMINATE_S
    assert drains(engine) == ['drain {"grace_s": 0.5, "cancel_s": 1.0}']


def test_stop_reports_no_phase_of_the_boot(start: Start) -> None:
    """`on_event` gets the events of the boot; only `stop` gets the end of the drain."""
    events: list[str] = []
    engine = start(on_event=lambda name, _: events.append(name))
    stop(engine, GRACE_S)

    assert events[-1] == "ready"
