"""What every benchmark prints and saves: a line per target, and a JSON file with machine, versions and date."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Target:
    """One measured figure and its upper bound; a figure whose target is None is reported only."""

    name: str
    figure: float
    target: float | None
    unit: str

    @property
    def verdict(self) -> str:
        """HELD or MISSED; `-` without a target."""
        if self.target is None:
            return "-"
        return "HELD" if self.figure <= self.target else "MISSED"

    def __str__(self) -> str:
        """Return the line that is printed."""
        bound = "" if self.target is None else f"<= {self.target:g} {self.unit}".rstrip()
        return f"{self.name:<58} {self.figure:>9.3f} {self.unit:<3} {bound:<12} {self.verdict}"


@dataclass
class Report:
    """The figures of one run of one benchmark."""

    name: str
    targets: list[Target] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: _versions("modal", "vllm-service"))
    samples: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, figure: float, target: float | None = None, unit: str = "") -> None:
        """Record one figure."""
        self.targets.append(Target(name, figure, target, unit))

    def sample(self, name: str, values: Sequence[float]) -> float:
        """Record a series of measurements and return its median."""
        self.samples[name] = [round(value, 4) for value in values]
        return statistics.median(values)

    def finish(self, *, keep: bool = True) -> int:
        """Print every line, write the file if `keep`, return the exit code: 1 when a target was missed."""
        for name, values in self.samples.items():
            spread = f"{min(values):.2f} to {max(values):.2f}"
            print(f"{name:<58} {statistics.median(values):>9.3f} s   median of {len(values)}, {spread}")
        for target in self.targets:
            print(target)
        record = {
            "benchmark": self.name,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "machine": _machine(),
            "versions": {**self.versions, "python": platform.python_version()},
            "targets": [{**asdict(target), "verdict": target.verdict} for target in self.targets],
            "samples": self.samples,
        }
        if keep:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{self.name}.json").write_text(json.dumps(record, indent=2) + "\n")
        return int(any(target.verdict == "MISSED" for target in self.targets))


def _versions(*packages: str) -> dict[str, str]:
    """Return the versions of the installed ones of these packages."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "?")
    memory_gb = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gb": memory_gb, "gpus": _gpus(), "system": sys.platform}


def _gpus() -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
