"""Beginnings and ends: signals, deaths and ports, with the real engine and a stream in flight."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import psutil
import pytest
import requests

from .dialogues import dialogue
from .running import BOOT_S, GONE_S, Service, free_port, port_is_free, wait_until
from .streams import ENDLESS, check_whole, count_to_ninety, stream

Start = Callable[..., Service]
MEMORY_LIMIT_MB = 120
PARENT_KILLED_S = 5  # after the parent was killed the engine is gone within
ENGINE_KILLED_S = 5  # after the engine was killed the command has ended within


def test_ready_parent_is_small(tiny: Service) -> None:
    """The process that supervises stays under its limit of memory."""
    assert psutil.Process(tiny.pid).memory_info().rss <= MEMORY_LIMIT_MB * 1e6


def test_ready_engine_is_one_session_of_its_own(tiny: Service) -> None:
    """The engine leads a session of its own, apart from the terminal's, and has its core in it."""
    leader = tiny.leader()
    assert leader in tiny.engine()
    assert psutil.Process(tiny.pid) not in tiny.engine()
    assert set(leader.children(recursive=True)) < set(tiny.engine())


def test_interrupt_lets_a_stream_finish_cuts_endless_ones_and_refuses_new_requests(start: Start) -> None:
    """SIGINT amid streams: one that ends within the drain is whole, longer ones end with an error after it.

    A new request gets 503 meanwhile, and is told when to come again. All is gone within 10 s, with code 0.
    """
    service = start("tiny").wait_ready()
    (core,) = [process for process in service.engine() if process != service.leader()]
    paths = ("/v1/chat/completions", "/v1/completions")
    with ThreadPoolExecutor(len(paths)) as pool, ExitStack() as streams:
        endless = [streams.enter_context(stream(service, path, **{**ENDLESS, "n": 1})) for path in paths]
        finite = streams.enter_context(stream(service))
        count_to_ninety(finite)
        refused = [pool.submit(first_refusal, service, path) for path in paths]
        core.suspend()
        asked = service.signal(signal.SIGINT)
        service.wait_said("Stopping")
        core.resume()
        check_whole(list(finite))
        core.suspend()
        cut = [list(events) for events in endless]
        core.resume()  # its end would take the whole time that the shutdown budget allows otherwise
        answers = [future.result(10) for future in refused]
    service.wait_gone(asked + GONE_S)
    assert service.wait_ended(GONE_S) == 0
    assert time.monotonic() - asked < GONE_S
    for answer in answers:
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    for *_, last, done in cut:
        assert done == "[DONE]"
        error = json.loads(last)["error"]
        assert (error["type"], error["code"], error["status"]) == ("server_error", "shutting_down", 503)


def test_termination_lets_a_stream_finish(start: Start) -> None:
    """SIGTERM amid a stream: it gets its last word, and then all is gone within 10 s with code 0.

    This engine computes with as many threads as there are cores, as outside the tests.
    """
    service = start("tiny", OMP_NUM_THREADS=str(os.cpu_count()), VLLM_CPU_OMP_THREADS_BIND="auto").wait_ready()
    service.engine()
    with stream(service) as events:
        count_to_ninety(events)
        asked = service.signal(signal.SIGTERM)
        check_whole(list(events))
    service.wait_gone(asked + GONE_S)
    assert service.wait_ended(GONE_S) == 0
    assert time.monotonic() - asked < GONE_S


def first_refusal(service: Service, path: str) -> requests.Response:
    """Ask again and again from the drain's beginning on; return the first answer that is not a success."""
    wait_until(lambda: "Stopping" in service.err, 10, service)
    body = {"model": "llm", "prompt": "One", **dialogue("count").request, "max_tokens": 1}
    while (answer := requests.post(f"{service.url}{path}", json=body, timeout=10)).status_code == 200:
        pass
    return answer


@pytest.fixture(scope="module")
def two_starts(engine_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Service]]:
    """Two services that began together on one port, once one of them has ended or both say that they are ready."""
    state, port = tmp_path_factory.mktemp("two"), free_port()
    with Service(state, "tiny", port=port, name="one") as one, Service(state, "tiny", port=port, name="other") as other:
        both = (one, other)
        wait_until(lambda: any(s.ended for s in both) or all("Ready" in s.out for s in both), BOOT_S, one)
        yield both


def test_two_starts_at_once_on_one_port_give_one_service(two_starts: tuple[Service, Service], tiny: Service) -> None:
    """Of two that begin together one serves and the other says that the port is taken and never that it is ready."""
    assert not all("Ready" in service.out for service in two_starts), "Both say that they serve."
    (loser,) = [service for service in two_starts if service.ended]
    (winner,) = [service for service in two_starts if not service.ended]
    assert loser.wait_ended(1) == 1
    assert f"{winner.port}" in loser.err
    assert "Ready" not in loser.out
    winner.wait_ready()
    for service in (winner, tiny):  # another port is another service
        assert requests.get(f"{service.url}/health", timeout=10).json() == {"status": "ok"}
    assert not port_is_free(winner.port)


def test_stop_asked_twice_ends_at_once(two_starts: tuple[Service, Service]) -> None:
    """The second Ctrl-C does not wait for the stream. It ends the one of the two starts that serves."""
    (service,) = [service for service in two_starts if not service.ended]
    service.wait_ready()
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
