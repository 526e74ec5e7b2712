"""Faults on Modal's stand-in: a gateway and a tier with the real engine. `python -m bench.chaos.plane --help`."""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp

from bench.chaos.load import CLOSED, CUT, LATE, REFUSED, WRONG, Load, Outcome, ask
from bench.chaos.requests import KEYS, draw
from bench.report import Report
from tests.contract.conftest import deploy, engine_leader, runtime_with_engine
from tests.contract.gateways import APP, TAG, deploy_gateway
from tests.fakes.modal import ModalPlane, TaskState, processes

MODEL = "tiny-l4"
_BOOT_LIMIT_S, _SLACK_S, _GONE_S = 200.0, 5.0, 35.0
_PAGE = 4096
_LOST = frozenset({"engine_lost", "api_error", CUT})
_NO_GATEWAY = frozenset({REFUSED, CLOSED, CUT})  # and what Modal's own proxy says


@dataclass(frozen=True)
class PlaneKind:
    """One kind of fault, like `kinds.Kind`; with `proxy` Modal's own proxy may answer."""

    name: str
    inject: Callable[[ModalPlane, random.Random], Awaitable[None]]
    tolerates: frozenset[str] = frozenset()
    proxy: bool = False
    boots: int = 1


def _live(plane: ModalPlane, tag: str) -> Any:
    return next(task for task in reversed(plane.tasks) if task.tag == tag and task.is_live)


async def _kill_core(plane: ModalPlane, _: random.Random) -> None:
    leader = engine_leader(_live(plane, "Server"))
    next(child for child in leader.children() if "EngineCore" in " ".join([child.name(), *child.cmdline()])).kill()


async def _kill_engine(plane: ModalPlane, _: random.Random) -> None:
    engine_leader(_live(plane, "Server")).kill()


async def _kill_replica(plane: ModalPlane, _: random.Random) -> None:
    _live(plane, "Server").kill()


async def _preempt_replica(plane: ModalPlane, _: random.Random) -> None:
    _live(plane, "Server").preempt(grace_s=30)


async def _fail_restore(plane: ModalPlane, rng: random.Random) -> None:
    plane.snapshots.fail_next_restore()
    await _kill_replica(plane, rng)


async def _fill_volume(plane: ModalPlane, rng: random.Random) -> None:
    volume = plane.volumes["vllm-cache"]
    volume.capacity_bytes = sum(len(volume.read(file)) + _PAGE for file in volume.files()) + 16 * _PAGE  # what is there
    try:
        await _kill_replica(plane, rng)
        await asyncio.sleep(rng.uniform(1, 5))
    finally:
        volume.capacity_bytes = None


async def _kill_gateway(plane: ModalPlane, _: random.Random) -> None:
    _live(plane, TAG).kill()


async def _preempt_gateway(plane: ModalPlane, _: random.Random) -> None:
    _live(plane, TAG).preempt(grace_s=30)


async def _pause(plane: ModalPlane, rng: random.Random) -> None:
    with processes.frozen(_live(plane, rng.choice(("Server", TAG))).members()):
        await asyncio.sleep(rng.uniform(0.1, 2))


KINDS = (
    PlaneKind("the engine core in a replica is killed", _kill_core, _LOST),
    PlaneKind("the API process in a replica is killed", _kill_engine, _LOST),
    PlaneKind("a replica is killed", _kill_replica, _LOST),
    PlaneKind("a replica is preempted", _preempt_replica, _LOST),
    PlaneKind("a replica is killed, and the next restore fails", _fail_restore, _LOST, boots=2),
    PlaneKind("a replica is killed while the volume is full", _fill_volume, _LOST),
    PlaneKind("the gateway is killed", _kill_gateway, _NO_GATEWAY, proxy=True),
    PlaneKind("the gateway is preempted", _preempt_gateway, _NO_GATEWAY, proxy=True),
    PlaneKind("a container is paused", _pause),
)  # fmt: skip


@contextmanager
def serving(directory: Path) -> Iterator[ModalPlane]:
    """Deploy a tier and a gateway with the keys of the load."""
    with ModalPlane(directory / "plane", container=runtime_with_engine(directory / "client")) as plane:
        token = plane.proxy_tokens.create()
        plane.secrets.put("vllm-api-key", {"API_KEYS": ",".join(f"{name}={key}" for name, key in KEYS.items())})
        plane.secrets.put("vllm-proxy-token", {"MODAL_KEY": token.key, "MODAL_SECRET": token.secret})
        deploy(plane, SERVICE_MODEL="tiny", SERVICE_GPU="L4", SERVICE_MAX_INPUTS="200")
        deploy_gateway(plane, SERVICE_MODEL="tiny")
        yield plane


class Series:
    """Faults one after another.

    Args:
        plane: With tier and gateway.
        seed: Of all that is random.
    """

    def __init__(self, plane: ModalPlane, seed: int) -> None:
        self._plane, self._seed, self._url = plane, seed, plane.url_of(APP, TAG)
        self._boot_s = 0.0
        self.outcomes: list[Outcome] = []
        self.violations: list[str] = []

    async def run(self, numbers: list[int], seconds: float) -> int:
        """Run the faults of these numbers, as many as begin within so many seconds; return how many that were."""
        self._boot_s = await self._ready_after(random.Random(self._seed))  # noqa: S311 - no secret
        print(f"seed {self._seed}; a boot takes {self._boot_s:.1f} s", flush=True)
        deadline = time.monotonic() + seconds
        for done, number in enumerate(numbers):
            if time.monotonic() > deadline:
                return done
            rng = random.Random(f"{self._seed} {number}")  # noqa: S311 - no secret
            before = len(self.violations)
            kind = KINDS[number % len(KINDS)]
            print(f"{number:>4} {kind.name}: {await self._episode(kind, rng)}", flush=True)
            for violation in self.violations[before:]:
                print(f"     VIOLATION: {violation}", flush=True)
            if self.violations[before:]:
                print(f"     again: python -m bench.chaos.plane --seed {self._seed} --only {number}", flush=True)
        return len(numbers)

    async def _episode(self, kind: PlaneKind, rng: random.Random) -> str:
        load = Load(self._url, rng, [MODEL], limit_s=_BOOT_LIMIT_S, clients=4)
        old = [task for task in self._plane.tasks if task.is_live]
        await asyncio.sleep(rng.uniform(0.2, 0.6))
        await kind.inject(self._plane, rng)
        took = await self._ready_after(rng)
        limit_s = kind.boots * self._boot_s + _SLACK_S
        if took > limit_s:
            self.violations.append(f"ready after {took:.1f} s, the limit is {limit_s:.1f} s")
        outcomes = await load.finish()
        self.violations += [f"{outcome}" for outcome in outcomes if not _is_allowed(kind, outcome)]
        await self._check_left(old)
        self.violations += [f"the stand-in failed: {failure}" for failure in self._plane.failures]
        self.outcomes += outcomes
        told = Counter(outcome.code or "answered" for outcome in outcomes)
        return ", ".join(f"{number} {code}" for code, number in sorted(told.items())) + f"; ready after {took:.1f} s"

    async def _ready_after(self, rng: random.Random) -> float:
        began = time.monotonic()
        async with aiohttp.ClientSession() as http:
            while (outcome := await ask(http, self._url, draw(rng, [MODEL]), _BOOT_LIMIT_S)).code:
                if time.monotonic() - began > _BOOT_LIMIT_S:
                    log = self._plane.tasks[-1].log[-2000:] if self._plane.tasks else "no container"
                    raise AssertionError(f"not ready after {_BOOT_LIMIT_S:g} s: {outcome}\n{log}")
                await asyncio.sleep(0.05)
        return time.monotonic() - began

    async def _check_left(self, old: list[Any]) -> None:
        deadline = time.monotonic() + _GONE_S
        ending = [task for task in old if task.state is TaskState.STOPPING or not task.is_live]
        while any(task.state is not TaskState.DEAD for task in ending) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        for task in ending:
            if task.state is not TaskState.DEAD:
                self.violations.append(f"container {task.id} had not ended after {_GONE_S:g} s")
            elif task.left_behind:
                self.violations.append(f"container {task.id} left {task.left_behind}")


def _is_allowed(kind: PlaneKind, outcome: Outcome) -> bool:
    if outcome.code == LATE:
        return False
    if kind.proxy and outcome.code == WRONG:
        return outcome.status >= 500  # of Modal's proxy, which has a form of its own
    return not outcome.code or outcome.code in kind.tolerates


def add_to(report: Report, numbers: list[int], seed: int, seconds: float = float("inf")) -> None:
    """Run the faults of these numbers, and report what became of them."""
    began = time.monotonic()
    with TemporaryDirectory(prefix="plane-") as directory, serving(Path(directory)) as plane:
        series = Series(plane, seed)
        done = asyncio.run(series.run(numbers, seconds))
    name = f"{done} faults on Modal's stand-in"
    report.add(f"{name}: violations", len(series.violations), 0)
    report.add(f"{name}: requests meanwhile", len(series.outcomes))
    report.add(f"{name}: of these answered right", sum(not outcome.code for outcome in series.outcomes))
    report.add(f"{name}: time", time.monotonic() - began, None, "s")


def main() -> int:
    """Run the faults; return 1 when something was violated."""
    parser = argparse.ArgumentParser(prog="python -m bench.chaos.plane", description=__doc__)
    parser.add_argument("--faults", type=int, default=50, help="how many")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no fault begins after so many")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="the same seed gives the same faults")
    parser.add_argument("--only", type=int, nargs="+", help="the numbers of the only faults to run")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # after it has cleaned up
    numbers = arguments.only or [*range(arguments.faults)]
    report = Report("chaos_plane")
    add_to(report, numbers, arguments.seed, arguments.seconds)
    return report.finish(keep=len(numbers) >= len(KINDS))


if __name__ == "__main__":
    sys.exit(main())
