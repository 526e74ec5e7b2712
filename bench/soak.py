"""Lifecycles of engines, a batch with kills, faults under load, hours at the knee: too slow for every test run."""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import batch_kills, pooled, steady
from bench.chaos import plane, series
from bench.lifecycles import Lifecycle, Lifecycles
from bench.report import Report

FAKE_TESTS = "tests/unit/bench/test_random_lifecycles.py"


def main() -> int:
    """Run all lifecycles, print the figures and save them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fakes", type=int, default=500, help="lifecycles of fake engines, for each of two tests")
    parser.add_argument("--holds", type=int, default=30, help="real engines that are held and released")
    parser.add_argument("--kills", type=int, default=20, help="real engines that are killed at a random moment")
    parser.add_argument("--pooled-s", type=float, default=600, help="seconds of clients that keep their connections")
    parser.add_argument(
        "--chaos", type=int, default=1000, help="faults under load, and a twentieth as many on Modal's stand-in"
    )
    parser.add_argument("--batch-lines", type=int, default=10_000, help="lines of a batch that is killed at random")
    parser.add_argument("--batch-kills", type=int, default=20, help="how often its gateway or its engine is killed")
    parser.add_argument("--steady-s", type=float, default=7200, help="seconds at the knee; 600 are the short form")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="seed of all that is random")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    report = Report("soak")
    with _part(report, "fake engines"):
        _add_fakes(report, arguments.fakes)
    with _part(report, "lifecycles"):
        _add_lifecycles(report, arguments.holds, arguments.kills, arguments.seed)
    with _part(report, "a batch with kills"):
        _add_batch(report, arguments.batch_lines, arguments.batch_kills, arguments.seed)
    with ThreadPoolExecutor(1) as beside:  # these clients mostly pause
        pausing = beside.submit(pooled.run, arguments.pooled_s, arguments.seed)
        with _part(report, "faults"):
            series.add_figures(report, *series.run_many(arguments.chaos, arguments.seed))
    with _part(report, "clients that pause"):
        _add_pausing(report, pausing.result())
    with _part(report, "faults on Modal's stand-in"):
        plane.add_to(report, [*range(arguments.chaos // 20)], arguments.seed)
    with _part(report, "the knee"):
        steady.run(arguments.steady_s, arguments.seed).add_to(report)
    return report.finish()


@contextmanager
def _part(report: Report, name: str) -> Iterator[None]:
    """Report a part that breaks off as missed, and go on: the others took an hour."""
    try:
        yield
    except Exception:  # noqa: BLE001 - whatever it is, it is printed
        traceback.print_exc()
        report.add(f"{name}: broke off", 1, 0)


def _add_fakes(report: Report, count: int) -> None:
    failed, seconds = _fakes(count)
    report.add(f"2 x {count} fake engines: tests that failed", failed, 0)
    report.add(f"2 x {count} fake engines: time", seconds, None, "s")


def _add_lifecycles(report: Report, holds: int, kills: int, seed: int) -> None:
    lifecycles = Lifecycles(random.Random(seed))  # noqa: S311 - no secret
    held = [_shown(lifecycles.hold_and_release()) for _ in range(holds)]
    killed = [_shown(lifecycles.kill_at_random()) for _ in range(kills)]
    report.add(f"{len(held)} holds and releases: not ready, or something left", _bad(held), 0)
    report.add(f"{len(killed)} kills at random: not reported, or something left", _bad(killed), 0)


def _add_batch(report: Report, lines: int, kills: int, seed: int) -> None:
    """Report a batch of the tiny model whose service is killed and started again."""
    kinds: list[batch_kills.Kind] = random.Random(seed).choices(["gateway", "engine"], k=kills)  # noqa: S311

    async def work(directory: Path) -> batch_kills.Outcome:
        async with batch_kills.UpSite(directory) as site:
            return await batch_kills.run(site, lines, kinds, seed, timeout_s=3600)

    began = time.monotonic()
    with TemporaryDirectory(prefix="batch-") as directory:
        outcome = asyncio.run(work(Path(directory)))
    print(outcome)
    name = f"batch of {lines} lines, {kills} kills"
    report.add(f"{name}: lines without an answer", lines - outcome.answered, 0)
    report.add(f"{name}: lines with more than one record", outcome.twice, 0)
    report.add(f"{name}: time", time.monotonic() - began, None, "s")


def _add_pausing(report: Report, clients: Mapping[str, pooled.Done]) -> None:
    for client, done in clients.items():
        print(client, done)
        report.add(
            f"{client}, {pooled.CONNECTIONS} connections, pauses to {pooled.PAUSE_S:g} s: failed", len(done.failures), 0
        )
        report.add(f"{client}: requests", done.requests)


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
