"""The service at its knee for a long time: nothing grows, answers stay as fast, and none is an error.

The knee is the least number of clients with nearly all of the throughput. Grown is what the last quarter has more than
the second: caches fill and buffers grow in the first.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import psutil

from bench.chaos.load import Load, Outcome
from bench.chaos.requests import ADMIN, KEYS
from bench.report import Report
from tests.engine.running import ONE_THREAD, Service

_STEPS = (1, 2, 4, 8, 16, 32)
_STEP_S = 10.0
_OF_THE_BEST = 0.9  # of the throughput
_ANSWER_S = 60.0
_LOOKS = 40  # of a run
_SERVICE_MB, _ENGINE_MB, _DESCRIPTORS, _THREADS, _TASKS, _TIMES = 8, 32, 8, 2, 8, 1.5  # what may have grown
_RUNNING_TASKS = re.compile(r"^gateway_tasks (\S+)$", re.M)
_SHOWN = 10


@dataclass(frozen=True)
class Look:
    """The processes at one moment."""

    service_mb: float
    engine_mb: float
    descriptors: int
    threads: int
    tasks: float


@dataclass
class Steady:
    """What became of a run."""

    clients: int = 0
    requests_per_s: float = 0.0
    looks: list[Look] = field(default_factory=list)
    latencies: list[tuple[float, float]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add_to(self, report: Report) -> None:
        """Report the figures."""
        name = f"{self.clients} clients at the knee"
        report.add(f"{name}: requests", len(self.latencies))
        report.add(f"{name}: requests a second", self.requests_per_s)
        report.add(f"{name}: errors and wrong answers", len(self.errors), 0)
        report.add(
            f"{name}: memory of the service grew by", self._grown(lambda look: look.service_mb), _SERVICE_MB, "MB"
        )
        report.add(f"{name}: memory of the engine grew by", self._grown(lambda look: look.engine_mb), _ENGINE_MB, "MB")
        report.add(f"{name}: descriptors grew by", self._grown(lambda look: look.descriptors), _DESCRIPTORS)
        report.add(f"{name}: threads grew by", self._grown(lambda look: look.threads), _THREADS)
        report.add(f"{name}: tasks grew by", self._grown(lambda look: look.tasks), _TASKS)
        second, last = (_p99(part) for part in self._quarters())
        report.add(f"{name}: p99", last, None, "s")
        report.add("load of the machine, average of 15 minutes", os.getloadavg()[2])
        report.add(f"{name}: p99, times that of before", last / second, _TIMES)

    def _grown(self, figure: Callable[[Look], float]) -> float:
        quarter = len(self.looks) // 4
        of = [figure(look) for look in self.looks]
        return statistics.median(of[-quarter:]) - statistics.median(of[quarter : 2 * quarter])

    def _quarters(self) -> tuple[list[float], list[float]]:
        """Return the latencies of the second and of the last quarter of the time."""
        end = max(at for at, _ in self.latencies)
        return tuple(
            [seconds for at, seconds in self.latencies if begin * end <= at <= (begin + 0.25) * end]
            for begin in (0.25, 0.75)
        )  # type: ignore[return-value]  # two


def run(seconds: float, seed: int) -> Steady:
    """Serve the tiny model, find the knee, and stay there; blocks."""
    keys = ",".join(f"{name}={key}" for name, key in KEYS.items())
    with (
        TemporaryDirectory(prefix="steady-") as directory,
        Service(Path(directory), "tiny", API_KEYS=keys, API_LIMITS=ADMIN, **ONE_THREAD) as service,  # type: ignore[arg-type]  # variables
    ):
        service.wait_ready()
        return asyncio.run(_run(service, seconds, random.Random(seed)))  # noqa: S311 - no secret


async def _run(service: Service, seconds: float, rng: random.Random) -> Steady:
    done = Steady()
    rates = {clients: await _rate(service, clients, rng) for clients in _STEPS}
    done.clients = next(clients for clients in _STEPS if rates[clients] >= _OF_THE_BEST * max(rates.values()))
    print(f"requests a second by clients: { {clients: round(rate, 1) for clients, rate in rates.items()} }", flush=True)
    began = time.monotonic()

    def take(outcome: Outcome) -> None:
        done.latencies.append((time.monotonic() - began, outcome.seconds))
        if outcome.code:
            done.errors.append(str(outcome))
            if len(done.errors) <= _SHOWN:
                print(f"ERROR {outcome}", flush=True)

    load = _load(service, done.clients, rng, take)
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEYS['alice']}"}) as http:
        for number in range(1, _LOOKS + 1):
            await asyncio.sleep(began + number * seconds / _LOOKS - time.monotonic())
            done.looks.append(await _look(service, http))
            print(f"{time.monotonic() - began:>6.0f} s {done.looks[-1]}", flush=True)
    await load.finish()
    done.requests_per_s = len(done.latencies) / (time.monotonic() - began)
    return done


async def _rate(service: Service, clients: int, rng: random.Random) -> float:
    """Return the requests a second of so many clients."""
    load = _load(service, clients, rng)
    began = time.monotonic()
    await asyncio.sleep(_STEP_S)
    return len(await load.finish()) / (time.monotonic() - began)


def _load(service: Service, clients: int, rng: random.Random, take: Callable[[Outcome], None] | None = None) -> Load:
    return Load(service.url, rng, ["tiny"], limit_s=_ANSWER_S, clients=clients, constrained=False, take=take)


async def _look(service: Service, http: aiohttp.ClientSession) -> Look:
    async with http.get(f"{service.url}/metrics") as answer:
        tasks = _RUNNING_TASKS.findall(await answer.text())
    process = psutil.Process(service.pid)
    engine = process.children(recursive=True)
    return Look(
        _megabytes([process]),
        _megabytes(engine),
        sum(each.num_fds() for each in [process, *engine]),
        sum(each.num_threads() for each in [process, *engine]),
        float(tasks[0]),
    )


def _megabytes(processes: Sequence[psutil.Process]) -> float:
    return round(sum(each.memory_full_info().uss for each in processes) / 1e6, 1)


def main() -> int:
    """Stay at the knee; return 1 when something grew or failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    report = Report("steady")
    run(arguments.seconds, arguments.seed).add_to(report)
    return report.finish()


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


if __name__ == "__main__":
    sys.exit(main())
