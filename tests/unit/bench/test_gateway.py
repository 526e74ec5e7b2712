"""The benchmark's own upstream and clients: they agree on how many answers and chunks there were."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench.gateway_client import LoadError
from bench.gateway_doors import running
from bench.gateway_figures import AtLeast
from bench.gateway_load import Load, Work
from bench.gateway_stub import event, order
from bench.processes import free_port


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
        yield Work(port, "key", "model", order("answer", 1024), clients=4, requests=8)


def test_load_answers_are_counted_and_timed(load: Load, work: Work) -> None:
    """As many as were asked for; their first bytes took some time, and the delay that was asked for."""
    done = load.run(work)
    late = load.run(replace(work, message=order("answer", 1024, 100)))

    assert (done.requests, done.chunks) == (8, 0)
    assert 0 < done.p50_ms <= done.p99_ms
    assert late.p50_ms >= 99


@pytest.mark.parametrize("rate", [0, 1000])
def test_load_stream_has_all_its_chunks(load: Load, work: Work, rate: int) -> None:
    """So many as were asked for, and those that end it: the reason and [DONE]."""
    done = load.run(replace(work, message=order("stream", 100, rate), stream=True))

    assert (done.requests, done.chunks) == (8, 8 * 102)
    assert rate == 0 or done.seconds >= 2 * 0.099


def test_load_window_counts_what_is_in_it(load: Load, work: Work) -> None:
    """A stream at a fixed rate passes at that rate, whoever begins and ends it when."""
    paced = replace(work, message=order("stream", 50, 500), stream=True, requests=0, warm_s=0.1, seconds=3.0)

    assert load.run(paced).chunks_per_s == pytest.approx(4 * 500, rel=0.35)


def test_load_held_streams_stay_until_released(load: Load, work: Work) -> None:
    """Others are served meanwhile."""
    load.hold(replace(work, message=order("idle"), stream=True, clients=60))
    assert load.run(work).requests == 8
    load.release()


def test_load_image_body_reaches_the_stub(load: Load, work: Work) -> None:
    """Megabytes of it, and the order in front of them is obeyed."""
    assert load.run(replace(work, image_bytes=2_000_000)).requests == 8


def test_load_answer_other_than_200_ends_the_work(load: Load, work: Work) -> None:
    """A benchmark of errors would be a fast one."""
    with pytest.raises(LoadError, match="status 404"):
        load.run(replace(work, message="no order"))

    assert load.run(work).requests == 8


def test_running_server_that_ends_is_told(tmp_path: Path) -> None:
    """With what it said."""
    command = [sys.executable, "-c", "print('no port is free')"]

    with (
        pytest.raises(SystemExit, match="no port is free"),
        running("it", command, tmp_path / "log", "http://127.0.0.1:9"),
    ):
        pass


def test_event_is_what_an_engine_streams() -> None:
    """One event of a chat, and its end."""
    assert event({"content": "a"}).startswith(b'data: {"id": "chatcmpl')
    assert event({"content": "a"}).endswith(b"}\n\n")


@pytest.mark.parametrize(("figure", "verdict"), [(5.0, "HELD"), (4.9, "MISSED")])
def test_figure_to_reach_from_below_is_held_from_there_on(figure: float, verdict: str) -> None:
    """Targets of speed."""
    assert AtLeast("requests/s", figure, 5, "x").verdict == verdict
