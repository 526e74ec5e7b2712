"""The phases of a boot: from events and their times, and from what vLLM logs of its own phases, to spans.

Times are of CLOCK_MONOTONIC. Which phase ends with which event stands in `in_engine/vllm_service/events.py`. A second
engine of the same boot (a cold one after a wake that failed) has events of its own.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from service.boots.records import Span
from service.in_engine.vllm_service.events import Event

# vLLM 0.32 logs afterwards how long these took. Source: compilation/monitor.py, v1/worker/gpu_model_runner.py
_LOGGED = (
    ("compile", re.compile(r"torch\.compile took ([\d.]+) s in total")),
    ("graphs", re.compile(r"Graph capturing finished in ([\d.]+) secs")),
    ("weights", re.compile(r"Loading weights took ([\d.]+) seconds")),
)


class Phases:
    """What has happened in one boot, and when. Thread-safe: events are only added."""

    def __init__(self) -> None:
        self._engines: list[dict[Event, float]] = []
        self._spans: list[Span] = []  # in CLOCK_MONOTONIC
        self._logged: set[tuple[int, str]] = set()  # number of the engine, phase
        self._zero = time.monotonic()

    def begin(self, at: float | None = None) -> None:
        """Count from here: what came before was done by an earlier replica, and its spans are negative."""
        self._zero = time.monotonic() if at is None else at

    def engine_begins(self) -> None:
        """Take the events that follow as another engine's."""
        self._engines.append({})

    def mark(self, event: Event, at: float | None = None) -> None:
        """Take an event of the engine that began last."""
        self._engines[-1][event] = time.monotonic() if at is None else at

    def add(self, name: str, start: float, end: float) -> None:
        """Take a phase that is not the engine's; times of CLOCK_MONOTONIC."""
        self._spans.append(Span(name, start, end))

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Take what happens in the block as a phase, if it goes well."""
        began = time.monotonic()
        yield
        self.add(name, began, time.monotonic())

    def read(self, line: str) -> None:
        """Take the duration of a phase from a line of vLLM's log, which it writes when the phase has ended."""
        for name, pattern in _LOGGED:
            key = (len(self._engines), name)
            if (match := pattern.search(line)) and key not in self._logged:  # each worker logs it
                self._logged.add(key)
                now = time.monotonic()
                self._spans.append(Span(name, now - float(match[1]), now))

    @property
    def seconds(self) -> float:
        """Seconds since zero."""
        return time.monotonic() - self._zero

    def spans(self) -> tuple[Span, ...]:
        """Return all phases that have ended, by their start, in seconds since zero."""
        spans = [*self._spans, *(span for times in self._engines for span in _phases(times))]
        since = [Span(s.name, round(s.start - self._zero, 3), round(s.end - self._zero, 3)) for s in spans]
        return tuple(sorted(since, key=lambda span: (span.start, span.end)))


def _phases(times: dict[Event, float]) -> Iterator[Span]:
    for event, end in tuple(times.items()):
        begins = [times[begin] for begin in map(Event, event.since) if times.get(begin, end + 1) <= end]
        if event.phase and begins:
            yield Span(event.phase, max(begins), end)
