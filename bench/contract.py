"""The Modal contract suite three times in a row, and the control plane's own speed. Run by `make bench-contract`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.report import Report
from tests.fakes.modal import ContainerRuntime, ModalPlane, client_directory

REPOSITORY = Path(__file__).parents[1]
RUNS = 3
SUITE = ["-n", "2", "--dist", "loadfile", "tests/contract", "tests/fakes"]  # as `make test` runs it


def main() -> int:
    """Measure, print, keep; a failing run ends it."""
    report = Report("contract")
    with TemporaryDirectory() as directory:
        starts, deploys = _plane(Path(directory))
    report.add("the plane starts, median", report.sample("plane start", starts), 0.5, "s")
    report.add("a deploy against it, median", report.sample("deploy", deploys), 3.0, "s")
    suites = [_suite(number) for number in range(1, RUNS + 1)]
    report.sample("contract suite", suites)
    report.add("contract suite, slowest of three without a failure", max(suites), 360, "s")
    return report.finish()


def _plane(directory: Path) -> tuple[list[float], list[float]]:
    runtime = ContainerRuntime(client_path=client_directory(directory / "client"))
    starts, deploys = [], []
    for number in range(5):
        began = time.monotonic()
        with ModalPlane(directory / f"plane-{number}", container=runtime) as plane:
            starts.append(time.monotonic() - began)
            began = time.monotonic()
            subprocess.run(
                [sys.executable, "-m", "modal", "deploy", "-m", "service.server"],
                cwd=REPOSITORY,
                env={**os.environ, **plane.env},
                stdout=subprocess.DEVNULL,
                check=True,
            )
            deploys.append(time.monotonic() - began)
    return starts, deploys


def _suite(number: int) -> float:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *SUITE], cwd=REPOSITORY, check=False)
    seconds = time.monotonic() - began
    if done.returncode:
        raise SystemExit(f"run {number} of the contract suite failed after {seconds:.0f} s")
    print(f"run {number}: {seconds:.0f} s", flush=True)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
