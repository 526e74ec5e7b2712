"""Beginnings and ends: signals, deaths and ports, with the real engine and a stream in flight."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest
import requests

from .dialogues import dialogue
from .running import BOOT_S, GONE_S, Service, free_port, port_is_free, wait_until

Start = Callable[..., Service]
MEMORY_LIMIT_MB = 120
PARENT_KILLED_S = 5  # after the parent was killed the engine is gone within
ENGINE_KILLED_S = 5  # after the engine was killed the command has ended within
ENDLESS = {"n": 16, "max_tokens": 1900, "ignore_eos": True}  # far longer than any drain


@contextmanager
def stream(service: Service, **fields: object) -> Iterator[Iterator[str]]:
    """Open a stream and give its events, of which the first has come: it is in flight."""
    body = {"model": "llm", "stream": True, **dialogue("count").request, **fields}
    with requests.post(f"{service.url}/v1/chat/completions", json=body, stream=True, timeout=120) as answer:
        assert answer.status_code == 200
        events = (line.decode().removeprefix("data: ") for line in answer.iter_lines() if line)
        while not content(next(events)):
            pass  # the role comes before the first word
        yield events


def content(event: str) -> str:
    """Return the words of an event."""
    return "".join(choice["delta"].get("content") or "" for choice in json.loads(event).get("choices", []))


def test_ready_parent_is_small(tiny: Service) -> None:
    """The process that supervises stays under its limit of memory."""
    assert psutil.Process(tiny.pid).memory_info().rss <= MEMORY_LIMIT_MB * 1e6


def test_ready_engine_is_one_session_of_its_own(tiny: Service) -> None:
    """The engine leads a session of its own, apart from the terminal's, and has its core in it."""
    leader = tiny.leader()
    assert leader in tiny.engine()
    assert psutil.Process(tiny.pid) not in tiny.engine()
    assert set(leader.children(recursive=True)) < set(tiny.engine())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_stop_with_a_stream_in_flight_lets_it_finish(start: Start, number: int) -> None:
    """The signal comes amid a stream: the stream gets its last word, and then all is gone within 10 s with code 0."""
    service = start("tiny").wait_ready()
    service.engine()
    with stream(service) as events:
        said = ""
        while " 9" not in said[100:]:  # past 40: what is left after 90 fits the drain on a busy machine too
            said += content(next(events))
        asked = service.signal(number)
        rest = list(events)
    assert rest[-1] == "[DONE]"
    assert "stop" in [choice["finish_reason"] for event in rest[:-1] for choice in json.loads(event)["choices"]]
    assert "".join(content(event) for event in rest[:-1]).endswith(dialogue("count").content[-20:])
    service.wait_gone(asked + GONE_S)
    assert service.wait_ended(GONE_S) == 0
    assert time.monotonic() - asked < GONE_S


def test_stop_with_a_stream_that_never_ends_cuts_it(start: Start) -> None:
    """A stream longer than the drain is cut: everything is gone within 10 s all the same."""
    service = start("tiny").wait_ready()
    service.engine()
    with stream(service, **ENDLESS) as events:
        asked = service.signal(signal.SIGINT)
        drain_to_the_end(events)
    service.wait_gone(asked + GONE_S)
    assert service.wait_ended(GONE_S) == 0
    assert time.monotonic() - asked < GONE_S


def drain_to_the_end(events: Iterator[str]) -> None:
    """Read a stream until it ends or breaks."""
    try:
        for _ in events:
            pass
    except requests.RequestException:
        pass


def test_stop_asked_twice_ends_at_once(start: Start) -> None:
    """The second Ctrl-C does not wait for the stream."""
    service = start("tiny").wait_ready()
    service.engine()
    with stream(service, **ENDLESS):
        service.signal(signal.SIGINT)
        service.wait_said("Stopping")
        asked = service.signal(signal.SIGINT)
        service.wait_gone(asked + 2)
    assert service.wait_ended(2) == 0


def test_parent_killed_takes_the_engine_along(start: Start) -> None:
    """`kill -9` of the command: no process of the engine runs 5 s later, though a stream was in flight."""
    service = start("tiny").wait_ready()
    assert len(service.engine()) >= 2
    with stream(service, **ENDLESS):
        asked = service.signal(signal.SIGKILL)
        service.wait_gone(asked + PARENT_KILLED_S)


@pytest.mark.parametrize("victim", ["leader", "core"])
def test_engine_killed_ends_the_command_with_the_reason(start: Start, victim: str) -> None:
    """`kill -9` of the engine's leader, or of its core: code 1 within 5 s, and stderr says what happened."""
    service = start("tiny").wait_ready()
    leader = service.leader()
    (core,) = [process for process in service.engine() if process != leader]
    killed = leader if victim == "leader" else core
    asked = time.monotonic()
    killed.kill()
    assert service.wait_ended(ENGINE_KILLED_S) == 1
    service.wait_gone(asked + ENGINE_KILLED_S)
    assert service.error.startswith("error: The engine ")
    assert "after it was ready" in service.error
    assert ("SIGKILL" if victim == "leader" else "engine core exited unexpectedly") in service.error
    assert "Traceback" not in service.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_stop_while_importing_leaves_nothing(start: Start, number: int) -> None:
    """A signal amid the boot ends it within seconds, with the code of an interruption."""
    service = start("tiny").wait_said("Importing vLLM")
    assert service.engine()
    asked = service.signal(number)
    assert service.wait_ended(5) == 130
    service.wait_gone(asked + 5)
    assert "Traceback" not in service.err


def test_stop_while_loading_leaves_nothing(start: Start) -> None:
    """A signal once the engine builds, when it has a child already, ends both."""
    service = start("tiny").wait_said("Loading the model")
    wait_until(lambda: len(service.engine()) >= 2, 60, service)
    asked = service.signal(signal.SIGINT)
    assert service.wait_ended(5) == 130
    service.wait_gone(asked + 5)


def test_port_in_use_is_named_before_the_engine_starts(start: Start) -> None:
    """A taken port is refused at once, by its number, with another to take; nothing was started."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        service = start("tiny", port=port)
        assert service.wait_ended(20) == 1
    assert f"Port {port}" in service.err
    assert f"SERVICE_PORT={port + 1}" in service.err
    assert "Starting the engine" not in service.err
    assert time.monotonic() - service.began < 5


def test_start_on_the_port_of_a_running_service_leaves_that_alone(start: Start, tiny: Service) -> None:
    """A second start on a served port is refused, and the first goes on with its log as it was."""
    before = tiny.log_file.read_text()
    second = start("tiny", port=tiny.port, XDG_STATE_HOME=str(tiny.directory))
    assert second.wait_ended(20) == 1
    assert f"Port {tiny.port}" in second.err
    assert requests.get(f"{tiny.url}/health", timeout=10).json() == {"status": "ok"}
    assert tiny.log_file.read_text().startswith(before)


def test_two_starts_at_once_on_one_port_give_one_service(
    start: Start, tiny: Service, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of two that begin together one serves and the other says that the port is taken and never that it is ready."""
    port = free_port()
    state = {"XDG_STATE_HOME": str(tmp_path_factory.mktemp("state"))}
    both = [start("tiny", port=port, name=name, **state) for name in ("one", "other")]
    wait_until(lambda: any(service.ended for service in both) or all("Ready" in s.out for s in both), BOOT_S, both[0])
    assert not all("Ready" in service.out for service in both), "Both say that they serve."
    (loser,) = [service for service in both if service.ended]
    (winner,) = [service for service in both if not service.ended]
    assert loser.wait_ended(1) == 1
    assert f"{port}" in loser.err
    assert "Ready" not in loser.out
    winner.wait_ready()
    for service in (winner, tiny):  # another port is another service
        assert requests.get(f"{service.url}/health", timeout=10).json() == {"status": "ok"}
    assert not port_is_free(port)
