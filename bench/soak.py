"""Many random lifecycles of fake engines and of the real one; too slow for every test run. `make soak`."""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import time

from bench.lifecycles import Lifecycle, Lifecycles
from bench.report import Report

FAKE_TESTS = "tests/unit/bench/test_random_lifecycles.py"


def main() -> int:
    """Run all lifecycles, print the figures and save them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fakes", type=int, default=500, help="lifecycles of fake engines, for each of two tests")
    parser.add_argument("--holds", type=int, default=30, help="real engines that are held and released")
    parser.add_argument("--kills", type=int, default=20, help="real engines that are killed at a random moment")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="seed of the lifecycles of real engines")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    report = Report("soak")
    failed, seconds = _fakes(arguments.fakes)
    report.add(f"2 x {arguments.fakes} fake engines: tests that failed", failed, 0)
    report.add(f"2 x {arguments.fakes} fake engines: time", seconds, None, "s")
    lifecycles = Lifecycles(random.Random(arguments.seed))  # noqa: S311 - no secret
    held = [_shown(lifecycles.hold_and_release()) for _ in range(arguments.holds)]
    killed = [_shown(lifecycles.kill_at_random()) for _ in range(arguments.kills)]
    report.add(f"{len(held)} holds and releases: not ready, or something left", _bad(held), 0)
    report.add(f"{len(killed)} kills at random: not reported, or something left", _bad(killed), 0)
    return report.finish()


def _fakes(count: int) -> tuple[int, float]:
    """Return how many of the two tests failed, and how many seconds they took."""
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "--lifecycles", str(count), FAKE_TESTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout)
    passed = re.search(r"^(\d+) passed", done.stdout, re.M)
    return 2 - (int(passed[1]) if passed else 0), time.monotonic() - began


def _shown(lifecycle: Lifecycle) -> Lifecycle:
    print("good" if lifecycle.good else "BAD", lifecycle, flush=True)
    return lifecycle


def _bad(lifecycles: list[Lifecycle]) -> int:
    return sum(not lifecycle.good for lifecycle in lifecycles)


if __name__ == "__main__":
    sys.exit(main())
