"""Lifecycles of the real engine, one after another: held and released, or killed at a random moment.

After each, the engine was READY or its failure was reported, and none of its processes, sockets and temporary files is
left.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from bench.processes import first_token, free_port
from service.engine import environment
from service.engine.process import State
from service.errors import EngineError
from service.registry.models import Registry
from service.replica.compile_caches import Caches
from service.replica.lifecycle import Replica
from service.replica.plan import Plan, Snapshot

STRATEGIES: tuple[Snapshot, ...] = ("off", "cpu", "gpu")


@dataclass(frozen=True)
class Lifecycle:
    """One engine, from its start to its end.

    Attributes:
        actions: What the benchmark did to it.
        outcome: `ready`, or the message of its failure; empty when a failure was not reported.
        left: Processes, files and ports that it left behind.
    """

    actions: str
    outcome: str
    left: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Tell whether its outcome was reported and nothing is left."""
        return bool(self.outcome) and not self.left


class Lifecycles:
    """Runs engines with the tiny model."""

    def __init__(self, rng: random.Random) -> None:
        self._random = rng
        env = environment.ensure()
        spec = Registry.load().specs["tiny"]
        caches = Caches(environment.compile_cache_dir(), environment.versions(env.device), model=spec.key)
        self._plan = Plan(spec, spec.key, env.device, env.python, os.environ, caches=caches)

    def hold_and_release(
        self, snapshot: Snapshot | None = None, ask: Callable[[int], object] = first_token
    ) -> Lifecycle:
        """Bring an engine to its hold, let it wait, release it, ask it for something, stop it.

        Args:
            snapshot: Which hold; by default one at random.
            ask: Called with the port of the engine when it is ready.
        """
        snapshot = snapshot or self._random.choice(STRATEGIES[1:])
        with _leftovers() as left:
            replica = self._replica(snapshot=snapshot)
            try:
                replica.prepare()
                time.sleep(self._random.uniform(0, 0.5))
                replica.start()
                ask(replica.plan.port)
                end = "ready"
            except EngineError as error:
                end = f"failed: {error}"
            finally:
                replica.stop()
        return Lifecycle(f"{snapshot}: held and released", end if end == "ready" else "", (*left, *_port_left(replica)))

    def kill_at_random(self) -> Lifecycle:
        """Kill the leader or one of its children at a random moment of the boot, or after it."""
        snapshot, moment_s = self._random.choice(STRATEGIES), self._random.uniform(0, 12)
        with _leftovers() as left:
            replica = self._replica(snapshot=snapshot, wake_timeout_s=10)
            killer = threading.Timer(moment_s, lambda: _kill_one(replica, self._random))
            killer.start()
            end = ""
            try:
                replica.prepare()
                replica.start()
                killer.join()
                if not replica.engine.wait_ended(10):
                    end = "ready: booted cold, or the killed process was not needed"
                replica.engine.wait_for(State.READY, 0)
            except EngineError as error:
                end = f"reported: {error}"
            finally:
                killer.cancel()
                replica.stop()
        return Lifecycle(f"{snapshot}: killed after {moment_s:.1f} s", end, (*left, *_port_left(replica)))

    def _replica(self, **changes: Any) -> Replica:
        return Replica(replace(self._plan, port=free_port(), startup_timeout_s=180, **changes))


def _kill_one(replica: Replica, rng: random.Random) -> None:
    try:
        leader = psutil.Process(replica.engine.pid)
        victims = [leader, *leader.children(recursive=True)]
        os.kill(rng.choice(victims).pid, signal.SIGKILL)
    except (EngineError, ProcessLookupError, psutil.NoSuchProcess, AssertionError):
        return  # no engine was running at that moment


@contextmanager
def _leftovers() -> Iterator[list[str]]:
    """Yield a list; after the block it names the child processes and files that the block left behind."""
    left: list[str] = []
    default = tempfile.tempdir
    before = _children()
    with tempfile.TemporaryDirectory() as directory:
        tempfile.tempdir = directory  # other processes have files in the default directory
        try:
            yield left
            deadline = time.monotonic() + 5
            while (children := _children() - before) and time.monotonic() < deadline:
                time.sleep(0.05)
            left += [f"process {child.pid}" for child in children]
            left += [f"file {path}" for path in sorted(Path(directory).iterdir())]
        finally:
            tempfile.tempdir = default


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _port_left(replica: Replica) -> list[str]:
    with socket.socket() as probe:
        return [] if probe.connect_ex(("127.0.0.1", replica.plan.port)) else [f"port {replica.plan.port}"]
