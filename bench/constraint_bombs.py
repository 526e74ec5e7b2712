"""What constraints that cost vLLM far more than their size cost it here, wherever they stand in a request.

Each goes to the real engine behind its guard, without the gateway and its bounds, through every field and protocol.
Meanwhile another client asks for one token again and again. Measured are the answer's time, how long the other client
waited, and the memory of all processes of the engine above its rest. With `--plain` each goes once to vLLM's own server
as well, in the same environment without this service's changes; it is killed where it does not answer.

Run by `make bench-constraints`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

from bench import processes
from bench.constraint_cases import COMPLETIONS, PLACES, PROMPT, Place, bombs
from bench.report import Report
from service.engine import environment
from service.engine.environment import EngineEnv
from service.registry.models import Registry
from service.replica.lifecycle import Replica
from service.replica.plan import Plan

PLAIN_S = 60.0  # that vLLM's own server has for an answer
MEMORY_MIB = 500.0
_TICK_S = 0.1
_BODY = {"model": "llm", "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
_FIRST = {kind: place for place in reversed(PLACES) for kind in place.kinds}


@dataclass(frozen=True)
class Cost:
    """What one request cost.

    Attributes:
        name: Kind and name of its constraint.
        place: Where it stood.
        status: Of the answer; 0: none in time.
        seconds: Until the answer's end.
        waited_s: The longest that the other client waited for its token.
        memory_mib: Of the engine, above its rest.
        message: Of an error.
    """

    name: str
    place: str
    status: int
    seconds: float
    waited_s: float
    memory_mib: float
    message: str

    def __str__(self) -> str:
        """Return the line that is printed."""
        figures = f"{self.status} {self.seconds:6.2f} s, others {self.waited_s:5.2f} s, {self.memory_mib:5.0f} MiB"
        return f"{figures}  {self.name}: {self.place}  {self.message[:90]}"


class Server:
    """A server under test.

    Args:
        url: Where it listens.
        pid: Its first process, whose descendants are the others.
    """

    def __init__(self, url: str, pid: int) -> None:
        self.url, self._leader = url, psutil.Process(pid)
        self._ask_for_a_token()
        self._rest = self._memory()

    def cost(self, name: str, place: Place, body: dict[str, Any], limit_s: float) -> Cost:
        """Send a request and measure what it costs."""
        waited, memory, done = [0.0], [self._rest], threading.Event()
        watchers = [
            threading.Thread(target=self._watch, args=(done, lambda: waited.append(self._ask_for_a_token()))),
            threading.Thread(target=self._watch, args=(done, lambda: memory.append(self._memory()))),
        ]
        for watcher in watchers:
            watcher.start()
        begun = time.monotonic()
        status, message = 0, ""
        try:
            body = {"model": "llm", **body}
            answer = requests.post(f"{self.url}{place.path}", json=body, timeout=limit_s)
            status, message = answer.status_code, "" if answer.ok else answer.text
        except requests.RequestException as error:
            message = type(error).__name__
        finally:  # Ctrl-C too
            seconds = time.monotonic() - begun
            time.sleep(_TICK_S)
            done.set()
            for watcher in watchers:
                watcher.join()
        mib = (max(memory) - self._rest) / 1024**2
        return Cost(name, place.name, status, seconds, max(waited), mib, message)

    def _watch(self, done: threading.Event, look: Callable[[], object]) -> None:
        while not done.is_set():
            look()
            done.wait(_TICK_S)

    def _ask_for_a_token(self) -> float:
        begun = time.monotonic()
        with contextlib.suppress(requests.RequestException):
            requests.post(f"{self.url}{COMPLETIONS}", json=_BODY, timeout=PLAIN_S)
        return time.monotonic() - begun

    def above_rest_mib(self) -> float:
        """Return the memory above that of the beginning."""
        return (self._memory() - self._rest) / 1024**2

    def _memory(self) -> float:
        return memory_of(self._leader)


def main() -> int:
    """Measure, print the figures and save them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plain", action="store_true", help="send each to vLLM's own server too")
    arguments = parser.parse_args()
    env = environment.ensure()
    report = Report("constraints")
    with guarded_engine(env) as server:
        costs = [
            _shown(server.cost(f"{kind}: {name}", place, place.body(kind, value), 300))
            for kind, name, value in bombs()
            for place in PLACES
            if kind in place.kinds
        ]
        report.add("memory of the engine above its rest afterwards", server.above_rest_mib(), None, "MiB")
    _add(report, "", costs)
    report.add("answers that are neither 200 nor 400", sum(cost.status not in {200, 400} for cost in costs), 0)
    report.add("longest wait of another client for one token", max(cost.waited_s for cost in costs), 2, "s")
    report.add("most memory above rest", max(cost.memory_mib for cost in costs), 2 * MEMORY_MIB, "MiB")
    if arguments.plain:
        _add(report, "vLLM's own server: ", [*_plain_costs(env.python)])
    return report.finish()


@contextmanager
def guarded_engine(env: EngineEnv, extra_args: tuple[str, ...] = ()) -> Iterator[Server]:
    """Boot the tiny model's replica without keys, and stop it in the end."""
    spec = Registry.load().specs["tiny"].model_copy(update={"extra_args": extra_args})
    plan = Plan(spec, spec.key, env.device, env.python, os.environ, port=processes.free_port())
    replica = Replica(plan)
    try:
        replica.prepare()
        replica.start({})
        yield Server(f"http://127.0.0.1:{plan.port}", replica.engine.pid)
    finally:
        replica.stop(0)


def family(process: psutil.Process) -> list[psutil.Process]:
    """Return a process and its descendants."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory_of(process: psutil.Process) -> float:
    """Return the proportional memory of a process and its descendants, in bytes."""
    found = 0.0
    for member in family(process):
        with contextlib.suppress(psutil.Error, OSError):
            rollup = Path(f"/proc/{member.pid}/smaps_rollup").read_text()
            found += next(float(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) * 1024
    return found


def _add(report: Report, whose: str, costs: list[Cost]) -> None:
    report.add(f"{whose}requests", len(costs))
    report.add(f"{whose}requests that were served", sum(cost.status == 200 for cost in costs))
    costly = [cost for cost in costs if cost.waited_s > 2 or cost.memory_mib > MEMORY_MIB or cost.status in {0, 500}]
    report.add(f"{whose}constraints over 2 s or 500 MiB, or without an answer", len({cost.name for cost in costly}))
    report.sample(f"{whose}time of an answer", [cost.seconds for cost in costs])
    report.sample(f"{whose}wait of another client", [cost.waited_s for cost in costs])


def _shown(cost: Cost) -> Cost:
    print(cost, flush=True)
    return cost


def _plain_costs(python: str) -> Iterator[Cost]:
    """Yield the costs of each constraint in vLLM's own server, a new one after each that is not answered."""
    waiting = list(bombs())
    while waiting:
        with plain_server(python) as server:
            while waiting:
                kind, name, value = waiting.pop(0)
                place = _FIRST[kind]
                yield (cost := _shown(server.cost(f"{kind}: {name}", place, place.body(kind, value), PLAIN_S)))
                if cost.status in {0, 500} or cost.waited_s > PLAIN_S / 2:
                    break


@contextmanager
def plain_server(python: str, extra_args: tuple[str, ...] = ()) -> Iterator[Server]:
    """Start vLLM's own server, without this service's changes, and kill it in the end."""
    port = processes.free_port()
    argv = [*processes.plain_vllm(python, port), "--served-model-name", "llm"]
    argv += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3", *extra_args]
    with processes.running(argv, grace_s=0, VLLM_PLUGINS="") as process:
        processes.wait_healthy(process, port)
        yield Server(f"http://127.0.0.1:{port}", process.pid)


if __name__ == "__main__":
    sys.exit(main())
