"""From events and lines of a log to the spans of a boot."""

from __future__ import annotations

import time

import pytest

from service.boots.phases import Phases
from service.in_engine.vllm_service.events import Event

OFF = {
    "started": 1,
    "released": 0.5,
    "imported": 3,
    "building": 3.5,
    "loaded": 7,
    "canary": 8,
    "opening": 8.5,
    "ready": 9,
}
CPU = {"started": 1, "imported": 3, "released": 5, "building": 6, "loaded": 8, "canary": 9, "opening": 9.5, "ready": 10}
GPU = {
    **{"started": 1, "imported": 2, "building": 3, "loaded": 5, "warmed": 7, "canary": 8, "asleep": 9},
    **{"released": 12, "awake": 13, "woken": 14, "opening": 14.5, "ready": 15},
}
Times = dict[str, float]
Spans = list[tuple[str, float, float]]


def marked(*engines: Times, zero: float = 0.0) -> Phases:
    """Return the phases of engines with these events."""
    phases = Phases()
    phases.begin(zero)
    for times in engines:
        phases.engine_begins()
        for name, at in times.items():
            phases.mark(Event(name), at)
    return phases


def spans_of(phases: Phases) -> Spans:
    """Return the spans as tuples."""
    return [(span.name, span.start, span.end) for span in phases.spans()]


@pytest.mark.parametrize(
    ("times", "spans"),
    [
        (OFF, [("import", 1, 3), ("import", 3, 3.5), ("load", 3.5, 7), ("canary", 7, 8), ("ready", 8, 9)]),
        (CPU, [("import", 1, 3), ("import", 5, 6), ("load", 6, 8), ("canary", 8, 9), ("ready", 9, 10)]),
        (
            GPU,
            [("import", 1, 2), ("import", 2, 3), ("load", 3, 5), ("warm-up", 5, 7), ("canary", 7, 8), ("sleep", 8, 9),
             ("wake", 12, 13), ("canary", 13, 14), ("ready", 14, 15)],
        ),
    ],
    ids=["off", "cpu", "gpu"],
)  # fmt: skip
def test_phases_of_a_boot_are_these(times: Times, spans: Spans) -> None:
    """The time under a hold belongs to no phase."""
    assert spans_of(marked(times)) == spans


@pytest.mark.parametrize("passed", range(len(GPU)))
def test_phases_of_a_boot_that_ended_early_are_those_that_ended(passed: int) -> None:
    """A phase that was begun and has not ended is left out."""
    times = dict(list(GPU.items())[:passed])
    spans = spans_of(marked(times))

    assert spans == [span for span in spans_of(marked(GPU)) if span[2] <= max(times.values(), default=0)]


def test_phases_of_a_canary_that_waited_for_its_release_end_with_it() -> None:
    """READY counts from the release, when that came last."""
    assert spans_of(marked({"canary": 2.0, "released": 5.0, "ready": 6.0})) == [("ready", 5.0, 6.0)]


def test_phases_count_from_zero_and_before_it() -> None:
    """After a restore, what came before is negative: an earlier replica paid."""
    phases = marked(GPU, zero=11.0)
    spans = phases.spans()

    assert [span.name for span in spans if span.end <= 0][-1] == "sleep"
    assert spans_of(phases)[-3:] == [("wake", 1.0, 2.0), ("canary", 2.0, 3.0), ("ready", 3.0, 4.0)]


def test_phases_begun_anew_keep_what_was_before() -> None:
    """`begin` comes in the middle: times and spans move, and none is lost."""
    phases = marked(GPU)
    phases.add("weights", 0.25, 0.75)
    phases.begin(10.0)

    assert spans_of(phases)[0] == ("weights", -9.75, -9.25)
    assert phases.seconds > 0


def test_phases_of_a_second_engine_are_its_own() -> None:
    """A cold boot after a wake that failed: no phase spans from one engine to the other."""
    first = {name: at for name, at in GPU.items() if name not in {"woken", "opening", "ready"}}
    second = {name: at + 20 for name, at in OFF.items()}
    spans = spans_of(marked(first, second))

    assert spans == spans_of(marked(first)) + spans_of(marked(second))
    assert max(end - start for _, start, end in spans) <= 4


def test_phases_of_the_service_stand_among_the_engines() -> None:
    """By their start, then by their end; they may overlap."""
    phases = marked(OFF)
    phases.add("caches", 3.5, 4.0)
    phases.add("weights", 0.0, 0.5)

    assert [name for name, _, _ in spans_of(phases)] == [
        *("weights", "import", "import", "caches", "load", "canary", "ready"),
    ]


@pytest.mark.parametrize(
    ("line", "name", "seconds"),
    [
        ("(EngineCore pid=7) INFO 11-20 22:01:02 [x.py:81] torch.compile took 33.21 s in total", "compile", 33.21),
        ("INFO 11-20 22:01:02 [gpu_model_runner.py:6001] Graph capturing finished in 12 secs, took 0.5 GiB",
         "graphs", 12.0),
        ("INFO 11-20 22:01:02 [default_loader.py:391] Loading weights took 4.56 seconds", "weights", 4.56),
    ],
)  # fmt: skip
def test_phases_read_what_vllm_says_of_its_own(line: str, name: str, seconds: float) -> None:
    """It says so when it has just ended."""
    phases = Phases()
    phases.engine_begins()
    phases.read(line)
    phases.read(line)  # each worker says it
    span = phases.spans()[0]

    assert span.name == name
    assert span.end - span.start == pytest.approx(seconds, abs=0.01)
    assert 0 <= span.end <= phases.seconds + 0.001


@pytest.mark.parametrize(
    "line", ["", "Loading weights took long", "torch.compile takes 3 s in total", "took 3 seconds"]
)
def test_phases_read_nothing_else(line: str) -> None:
    """Every line of the log comes by here."""
    phases = Phases()
    phases.engine_begins()
    phases.read(line)
    phases.read(line)  # each worker says it

    assert phases.spans() == ()


def test_phases_count_their_seconds_from_the_start() -> None:
    """On the clock of the engine's events, to the millisecond in a record."""
    before = time.monotonic()
    phases = Phases()
    phases.engine_begins()
    phases.mark(Event.STARTED)
    phases.mark(Event.IMPORTED)

    assert 0 <= phases.seconds <= time.monotonic() - before
    assert all(span.start == round(span.start, 3) for span in phases.spans())
