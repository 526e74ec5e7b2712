"""The benchmark's own upstream and clients agree on the number of responses and chunks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench import gateway_server
from bench.gateway_candidates import running
from bench.gateway_client import LoadError
from bench.gateway_figures import AtLeast
from bench.gateway_load import Load, Work
from bench.gateway_stub import event, instruction
from bench.processes import free_port
from service.cli import main as command
from service.local import serve


@pytest.fixture(scope="module")
def load() -> Iterator[Load]:
    """Return clients in a process of their own."""
    with Load.started() as started:
        yield started


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Work]:
    """Return work for four clients of a stub, two requests each."""
    port = free_port()
    command = [sys.executable, "-m", "bench.gateway_stub", str(port)]
    log = tmp_path_factory.mktemp("stub") / "log"
    with running("stub", command, log, f"http://127.0.0.1:{port}/health"):
        yield Work(port, "key", "model", instruction("answer", 1024), clients=4, requests=8)


def test_load_answers_are_counted_and_timed(load: Load, work: Work) -> None:
    """The clients count every response; times to first byte include the delay that the instruction names."""
    done = load.run(work)
    late = load.run(replace(work, message=instruction("answer", 1024, 100)))

    assert (done.requests, done.chunks) == (8, 0)
    assert 0 < done.p50_ms <= done.p99_ms
    assert late.p50_ms >= 99


@pytest.mark.parametrize("rate", [0, 1000])
def test_load_stream_has_all_its_chunks(load: Load, work: Work, rate: int) -> None:
    """A stream has as many chunks as the instruction names and two more: the finish reason and [DONE]."""
    done = load.run(replace(work, message=instruction("stream", 100, rate), stream=True))

    assert (done.requests, done.chunks) == (8, 8 * 102)
    assert rate == 0 or done.seconds >= 2 * 0.098  # 99 pauses, and uvloop's timers count whole milliseconds


def test_load_with_a_time_window_counts_only_inside_it(load: Load, work: Work) -> None:
    """Streams at a fixed rate are counted at that rate, although they begin and end outside the window."""
    paced = replace(work, message=instruction("stream", 50, 500), stream=True, requests=0, warm_s=0.1, seconds=3.0)

    assert load.run(paced).chunks_per_s == pytest.approx(4 * 500, rel=0.35)


def test_load_held_streams_stay_until_released(load: Load, work: Work) -> None:
    """The stub serves other requests while streams are held."""
    load.hold(replace(work, message=instruction("idle"), stream=True, clients=60))
    assert load.run(work).requests == 8
    load.release()


def test_load_image_body_reaches_the_stub(load: Load, work: Work) -> None:
    """The stub follows the instruction in front of an image of 2 MB."""
    assert load.run(replace(work, image_bytes=2_000_000)).requests == 8


def test_load_answer_other_than_200_ends_the_work(load: Load, work: Work) -> None:
    """An error response ends the work, since errors would be measured as fast responses."""
    with pytest.raises(LoadError, match="status 404"):
        load.run(replace(work, message="no instruction"))

    assert load.run(work).requests == 8


def test_running_server_that_exits_raises_with_its_output(tmp_path: Path) -> None:
    """A server that exits before it is healthy raises an error that has its output."""
    command = [sys.executable, "-c", "print('no port is free')"]

    with (
        pytest.raises(SystemExit, match="no port is free"),
        running("it", command, tmp_path / "log", "http://127.0.0.1:9"),
    ):
        pass


def test_event_is_what_an_engine_streams() -> None:
    """An event is one chunk of a chat completion and ends with an empty line."""
    assert event({"content": "a"}).startswith(b'data: {"id": "chatcmpl')
    assert event({"content": "a"}).endswith(b"}\n\n")


@pytest.mark.parametrize(("figure", "verdict"), [(5.0, "HELD"), (4.9, "MISSED")])
def test_lower_bound_is_held_at_or_above_it(figure: float, verdict: str) -> None:
    """A figure with a lower bound is HELD at or above it and MISSED below."""
    assert AtLeast("requests/s", figure, 5, "x").verdict == verdict


def test_command_gets_the_port_and_the_key_that_the_benchmark_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that this replaces are still those that `up` uses."""
    seen = []

    def main() -> None:
        with serve.reserved_port() as port:
            seen.append((port, serve.new_key(), sys.argv))

    monkeypatch.setenv(gateway_server.ENGINE_KEY, "key")
    monkeypatch.setattr(command, "main", main)
    gateway_server.up(7)
    assert seen == [(7, "key", ["vllm-service", "up", "tiny"])]
