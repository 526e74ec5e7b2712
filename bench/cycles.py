"""Lives of the real engine, one after another: held and released, or killed at a random moment. `make bench-cycles`.

After each: it was READY or its failure was reported, and no process, socket or temporary file of it is left.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from bench.processes import first_token, free_port
from bench.report import Report
from service.engine import environment
from service.engine.process import State
from service.errors import EngineError
from service.registry.models import Registry
from service.replica.compile_caches import Caches
from service.replica.lifecycle import Replica
from service.replica.plan import Plan, Snapshot

STRATEGIES: tuple[Snapshot, ...] = ("off", "cpu", "gpu")


def main() -> int:
    """Run both kinds, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--holds", type=int, default=30)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    lives = Lives(random.Random(arguments.seed))  # noqa: S311 - no secret
    report = Report("cycles")
    held = [_shown(lives.hold_and_release()) for _ in range(arguments.holds)]
    killed = [_shown(lives.kill_at_random()) for _ in range(arguments.kills)]
    report.add(f"{len(held)} holds and releases: not ready, or something left", _bad(held), 0)
    report.add(f"{len(killed)} kills at random: not reported, or something left", _bad(killed), 0)
    return report.finish()


def _shown(life: Life) -> Life:
    print("good" if life.good else "BAD", life, flush=True)
    return life


def _bad(lives: list[Life]) -> int:
    return sum(not life.good for life in lives)


@dataclass(frozen=True)
class Life:
    """One engine's life.

    Attributes:
        story: What was done to it.
        end: What came of it: `ready`, or the sentence of the failure.
        left: What is left of it.
    """

    story: str
    end: str
    left: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Whether it ended as it must."""
        return bool(self.end) and not self.left


class Lives:
    """Runs engines with the tiny model."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        env = environment.ensure(print)
        spec = Registry.load().specs["tiny"]
        caches = Caches(environment.compiled(), environment.versions(env.device), model=spec.key)
        self._plan = Plan(spec, spec.key, env.device, env.python, os.environ, caches=caches)

    def hold_and_release(self) -> Life:
        """Bring an engine to its hold, let it wait, release it, take a token, end it."""
        snapshot = self._chance.choice(STRATEGIES[1:])
        with _traces() as left:
            replica = self._replica(snapshot=snapshot)
            try:
                replica.prepare()
                time.sleep(self._chance.uniform(0, 0.5))
                replica.start()
                first_token(replica.plan.port)
                end = "ready"
            except EngineError as error:
                end = f"failed: {error}"
            finally:
                replica.stop()
        return Life(f"{snapshot}: held and released", end if end == "ready" else "", (*left, *_port_left(replica)))

    def kill_at_random(self) -> Life:
        """Kill the leader or one of its children at a random moment of the boot, or after it."""
        snapshot, moment_s = self._chance.choice(STRATEGIES), self._chance.uniform(0, 12)
        with _traces() as left:
            replica = self._replica(snapshot=snapshot, wake_timeout_s=10)
            killer = threading.Timer(moment_s, lambda: _kill_one(replica, self._chance))
            killer.start()
            end = ""
            try:
                replica.prepare()
                replica.start()
                killer.join()
                if not replica.engine.wait_ended(10):
                    end = "ready: booted cold, or what was killed was no part of it"
                replica.engine.wait_for(State.READY, 0)
            except EngineError as error:
                end = f"reported: {error}"
            finally:
                killer.cancel()
                replica.stop()
        return Life(f"{snapshot}: killed after {moment_s:.1f} s", end, (*left, *_port_left(replica)))

    def _replica(self, **changes: Any) -> Replica:
        return Replica(replace(self._plan, port=free_port(), startup_timeout_s=180, **changes))


def _kill_one(replica: Replica, chance: random.Random) -> None:
    try:
        leader = psutil.Process(replica.engine.pid)
        victims = [leader, *leader.children(recursive=True)]
        os.kill(chance.choice(victims).pid, signal.SIGKILL)
    except (EngineError, ProcessLookupError, psutil.NoSuchProcess, AssertionError):
        return  # there was none at that moment


@contextmanager
def _traces() -> Iterator[list[str]]:
    """Give a list that has, after the block, what came and was not taken away: children, files."""
    left: list[str] = []
    usual = tempfile.tempdir
    before = _children()
    with tempfile.TemporaryDirectory() as directory:
        tempfile.tempdir = directory  # others have files in the usual one
        try:
            yield left
            deadline = time.monotonic() + 5
            while (children := _children() - before) and time.monotonic() < deadline:
                time.sleep(0.05)
            left += [f"process {child.pid}" for child in children]
            left += [f"file {path}" for path in sorted(Path(directory).iterdir())]
        finally:
            tempfile.tempdir = usual


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _port_left(replica: Replica) -> list[str]:
    with socket.socket() as probe:
        return [] if probe.connect_ex(("127.0.0.1", replica.plan.port)) else [f"port {replica.plan.port}"]


if __name__ == "__main__":
    sys.exit(main())
