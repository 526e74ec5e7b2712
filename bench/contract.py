"""Runs the Modal contract tests three times, times the control plane, and tests Modal's newest patch release.

Run by `make bench-contract`; with `--client VERSION` it only runs the last part, with that release.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.report import Report
from service.engine.environment import PINS
from tests.fakes.modal import ContainerRuntime, ModalPlane, client_directory

REPOSITORY = Path(__file__).parents[1]
RUNS = 3
IN_THREE = ["-n", "3", "--dist", "loadfile", "--no-loadscope-reorder"]
SUITE = [*IN_THREE, "tests/contract", "tests/fakes"]  # as `make test` runs it
OF_A_CLIENT = ["tests/fakes", "tests/contract/test_deploy.py"]


def main() -> int:
    """Measure, print the figures and save them; a failing test ends the run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--client", metavar="VERSION", help="run the plane's own tests with this release of modal only")
    release = parser.parse_args().client
    if release:
        _with_client(release)
        return 0
    report = Report("contract")
    report.versions["modal, newest patch release"] = newest = _newest_patch()
    report.versions["commit"] = _output_of(["git", "rev-parse", "--short", "HEAD"])
    with TemporaryDirectory() as directory:
        starts, deploys = _plane(Path(directory))
    report.add("the plane starts, median", report.sample("plane start", starts), 0.5, "s")
    report.add("a deploy against it, median", report.sample("deploy", deploys), 3.0, "s")
    suites = []
    for number in range(1, RUNS + 1):
        seconds, tests = _suite(number)
        suites.append(seconds)
    report.sample("contract suite", suites)
    report.add("contract suite, slowest of three without a failure", max(suites), 360, "s")
    report.add("tests in it", tests)
    code = report.finish()
    if newest != version("modal"):
        _with_client(newest)
    return code


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


def _suite(number: int) -> tuple[float, int]:
    """Run all contract tests; return the seconds and the number of tests that passed."""
    began = time.monotonic()
    passed = _tests(sys.executable, SUITE)
    seconds = time.monotonic() - began
    print(f"run {number}: {passed} tests in {seconds:.0f} s", flush=True)
    return seconds, passed


def _tests(python: str, arguments: list[str]) -> int:
    command = [python, "-m", "pytest", "-q", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=False)
    passed = re.search(r"(\d+) passed", done.stdout)
    if done.returncode or not passed:
        raise SystemExit(f"{done.stdout}\n{' '.join(command)} failed")
    return int(passed[1])


def _newest_patch() -> str:
    """Return the newest release of modal in the package index that has the pinned minor version."""
    minor = ".".join(version("modal").split(".")[:2])
    compiling = ["pip", "compile", "-", "--quiet", "--no-deps", "--no-header", "--no-annotate"]
    return _output_of([sys.executable, "-m", "uv", *compiling], f"modal=={minor}.*").removeprefix("modal==")


def _with_client(release: str) -> None:
    """Run the plane's own tests and the deploys in an environment that has this release of modal."""
    with TemporaryDirectory() as directory:
        python = str(Path(directory) / "bin/python")
        _output_of([sys.executable, "-m", "uv", "venv", "--quiet", directory])
        for wanted in (["-r", str(PINS / "dev.lock")], [f"modal=={release}"]):
            _output_of(
                [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--python", python, *wanted]
            )
        print(f"{_tests(python, OF_A_CLIENT)} tests passed with modal {release}", flush=True)


def _output_of(command: list[str], stdin: str = "") -> str:
    done = subprocess.run(command, input=stdin, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
