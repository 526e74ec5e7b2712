"""The figures of `bench.gateway`: series with units, and targets that are lower bounds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

from bench.report import RESULTS, Report, Target


@dataclass(frozen=True)
class AtLeast(Target):
    """A figure whose target is a lower bound."""

    @property
    def verdict(self) -> str:
        """HELD or MISSED."""
        return "HELD" if self.target is None or self.figure >= self.target else "MISSED"

    def __str__(self) -> str:
        """Return the line that is printed."""
        bound = f">= {self.target:g} {self.unit}".rstrip()
        return f"{self.name:<58} {self.figure:>9.3f} {self.unit:<3} {bound:<12} {self.verdict}"


class Figures(Report):
    """The results of a run. A series has one figure per round; its median is compared with the target."""

    def __init__(self) -> None:
        super().__init__("gateway")
        self.versions |= {package: version(package) for package in ("httptools", "uvloop")}
        self._series: dict[str, tuple[list[float], str]] = {}
        self._not_measured: dict[str, str] = {}

    def series(self, name: str, values: Sequence[float], unit: str = "") -> float:
        """Record a series, one figure per round; return the median."""
        self._series[name] = ([round(value, 4) for value in values], unit)
        return statistics.median(values)

    def at_most(self, name: str, values: Sequence[float], target: float | None, unit: str = "") -> None:
        """Record a series whose median must be at most `target`; None: it is reported only."""
        self.add(name, self.series(name, values, unit), target, unit)

    def at_least(self, name: str, values: Sequence[float], target: float, unit: str = "") -> None:
        """Record a series whose median must be at least `target`."""
        self.targets.append(AtLeast(name, self.series(name, values, unit), target, unit))

    def missing(self, name: str, sentence: str) -> None:
        """Record a row that could not be measured, and how to make it possible."""
        self._not_measured[name] = sentence

    def finish(self, *, keep: bool = True) -> int:
        """Print every line, write the file if `keep`, return the exit code: 1 when a target was missed."""
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
