"""The phases of a boot: from marks in time, and from what vLLM's log says of its own, to spans.

A mark is a name and a moment of CLOCK_MONOTONIC. An engine's marks are its events; a second engine of the same boot (a
cold one after a wake that failed) has marks of its own.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from service.boots.records import Span

# phase, from the last of these marks, to this one
_SPANS = (
    ("import", ("started",), "imported"),
    ("import", ("imported", "released"), "building"),  # under a hold: what had to wait for a GPU
    ("load", ("building",), "loaded"),
    ("warm-up", ("loaded",), "warmed"),
    ("canary", ("loaded", "warmed"), "canary"),
    ("sleep", ("canary",), "asleep"),
    ("wake", ("asleep", "released"), "awake"),
    ("canary", ("awake",), "woken"),
    ("ready", ("canary", "woken", "released"), "ready"),
)
# vLLM 0.32 says afterwards how long these took. Source: compilation/monitor.py, v1/worker/gpu_model_runner.py
_SAID = (
    ("compile", re.compile(r"torch\.compile took ([\d.]+) s in total")),
    ("graphs", re.compile(r"Graph capturing finished in ([\d.]+) secs")),
    ("weights", re.compile(r"Loading weights took ([\d.]+) seconds")),
)


class Phases:
    """What has happened in one boot, and when. Thread-safe: marks are only added."""

    def __init__(self) -> None:
        self._engines: list[dict[str, float]] = []
        self._spans: list[Span] = []  # in CLOCK_MONOTONIC
        self._zero = time.monotonic()

    def begin(self, at: float | None = None) -> None:
        """Count from here: what came before was paid by an earlier replica, and its spans are negative."""
        self._zero = time.monotonic() if at is None else at

    def engine_begins(self) -> None:
        """Take the marks that follow as another engine's."""
        self._engines.append({})

    def mark(self, name: str, at: float | None = None) -> None:
        """Take a mark of the engine that began last."""
        self._engines[-1][name] = time.monotonic() if at is None else at

    def add(self, name: str, start: float, end: float) -> None:
        """Take a phase that is none of the engine's; moments of CLOCK_MONOTONIC."""
        self._spans.append(Span(name, start, end))

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Take what happens in the block as a phase, if it goes well."""
        began = time.monotonic()
        yield
        self.add(name, began, time.monotonic())

    def read(self, line: str) -> None:
        """Take what a line of vLLM's log says of a phase that has just ended."""
        for name, pattern in _SAID:
            if (match := pattern.search(line)) and name not in self._engines[-1]:  # each worker says it
                now = self._engines[-1][name] = time.monotonic()
                self._spans.append(Span(name, now - float(match[1]), now))

    @property
    def seconds(self) -> float:
        """Seconds since zero."""
        return time.monotonic() - self._zero

    def spans(self) -> tuple[Span, ...]:
        """Return all phases that have ended, by their start, in seconds since zero."""
        moments = [*self._spans, *(span for marks in self._engines for span in _between(marks))]
        since = [Span(s.name, round(s.start - self._zero, 3), round(s.end - self._zero, 3)) for s in moments]
        return tuple(sorted(since, key=lambda span: (span.start, span.end)))


def _between(marks: dict[str, float]) -> Iterator[Span]:
    for name, begins, end in _SPANS:
        known = [marks[begin] for begin in begins if begin in marks and marks[begin] <= marks.get(end, 0.0)]
        if end in marks and known:
            yield Span(name, max(known), marks[end])
