"""The figures of `bench.gateway`: series with units of their own, and targets that are to be reached from below."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

from bench.report import RESULTS, Report, Target


@dataclass(frozen=True)
class AtLeast(Target):
    """A figure that has to be this large, or larger."""

    @property
    def verdict(self) -> str:
        """HELD or MISSED."""
        return "HELD" if self.target is None or self.figure >= self.target else "MISSED"

    def __str__(self) -> str:
        """Return the line that is printed."""
        bound = f">= {self.target:g} {self.unit}".rstrip()
        return f"{self.name:<58} {self.figure:>9.3f} {self.unit:<3} {bound:<12} {self.verdict}"


class Figures(Report):
    """What a run found. Each series is a figure a round; its median is what counts."""

    def __init__(self) -> None:
        super().__init__("gateway")
        self.versions |= {package: version(package) for package in ("aiohttp", "uvicorn", "uvloop")}
        self._series: dict[str, tuple[list[float], str]] = {}
        self._not_measured: dict[str, str] = {}

    def series(self, name: str, values: Sequence[float], unit: str = "") -> float:
        """Keep a figure of every round; return the median."""
        self._series[name] = ([round(value, 4) for value in values], unit)
        return statistics.median(values)

    def at_most(self, name: str, values: Sequence[float], target: float | None, unit: str = "") -> None:
        """Take a figure of every round whose median is to be no more than this; None: it is reported only."""
        self.add(name, self.series(name, values, unit), target, unit)

    def at_least(self, name: str, values: Sequence[float], target: float, unit: str = "") -> None:
        """Take a figure of every round whose median is to be no less than this."""
        self.targets.append(AtLeast(name, self.series(name, values, unit), target, unit))

    def missing(self, name: str, sentence: str) -> None:
        """Take note of a row that could not be measured, and what it takes."""
        self._not_measured[name] = sentence

    def finish(self, *, keep: bool = True) -> int:
        """Print every line, write the file unless told not to, return the exit code: 1 when a target was missed."""
        for name, (values, unit) in self._series.items():
            median, spread = statistics.median(values), f"{min(values):.2f} to {max(values):.2f}"
            print(f"{name:<58} {median:>9.3f} {unit:<3} median of {len(values)}, {spread}")
        print()
        code = super().finish(keep=keep)
        for name, sentence in self._not_measured.items():
            print(f"{name:<58} not measured: {sentence}")
        if keep:
            file = RESULTS / f"{self.name}.json"
            record = json.loads(file.read_text())
            series = self._series.items()
            record["samples"] = {name: {"unit": unit, "values": values} for name, (values, unit) in series}
            record["not_measured"] = self._not_measured
            file.write_text(json.dumps(record, indent=2) + "\n")
        return code
