"""Attacks on a running service, in the long form: every extreme of every field, and 100,000 mutated inputs.

The targets and inputs are those of tests/security. A find is told by seed and number: `Mutations.input` makes it again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from bench.report import Report
from service.in_engine.vllm_service import http_contract
from tests.engine.guarded import POOLING
from tests.gateway.wire import MIB
from tests.security.barrage import Input, Outcome, barrage
from tests.security.mutations import Mutations
from tests.security.targets import EMBEDDING, OTHER_KEY, Target, gateway, guard, harm_in
from tests.security.test_fields import inputs as field_inputs

PARTS = 20  # of the inputs; memory and descriptors are read after each
GROWTH_MB = 64.0  # of memory from the first half to the second, less the cores and compilers of constraints,
CACHED_MB = 256.0  # which keep as much of compiled structured outputs
BYSTANDER_EVERY_S = 1.0


def main() -> int:
    """Attack gateway and guard, print the figures and save them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="mutated inputs, in all")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="seed of the inputs")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    report = Report("attack")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        targets = [stack.enter_context(gateway(directory)), stack.enter_context(guard())]
        generating = _document(targets[1])
        with guard(POOLING) as pooling:
            embedding = _document(pooling)
            _attack(report, pooling, _extremes(embedding, "llm"), "embeddings: ")
        for target in targets:
            _attack(report, target, _extremes(generating, "tiny"), "")
        _attack(report, targets[0], _extremes(embedding, EMBEDDING), "embeddings: ")
        numbers = itertools.count()
        for target in targets:
            mutations = Mutations(generating, "tiny", arguments.seed)
            _fuzz(report, target, mutations, itertools.islice(numbers, arguments.inputs // len(targets)))
        return report.finish()


def _growth(samples: Sequence[float]) -> float:
    """Return by how much the most of the second half is over that of the first."""
    half = len(samples) // 2
    return max(samples[half:]) - max(samples[:half])


def _document(target: Target) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(target.ask("GET", "/openapi.json").body)
    return found


def _extremes(document: Mapping[str, Any], model: str) -> Iterator[Input]:
    wanted = set(document["paths"])
    if "/v1/chat/completions" not in wanted:  # what every engine has is tried with the one that chats
        wanted = {path for path in wanted if any(route.tasks for route in http_contract.routes_at(path).values())}
    return (one for one in field_inputs(document, model) if one.path in wanted)


def _attack(report: Report, target: Target, inputs: Iterable[Input], what: str) -> None:
    lasting, logged = target.lasting(), len(target.log())
    outcome = barrage(target, inputs)
    _report(report, f"{target.name}, {what}{outcome.inputs} extremes of fields", outcome)
    _unharmed(report, f"{target.name}, {what}extremes", target, lasting, logged)


def _fuzz(report: Report, target: Target, mutations: Mutations, numbers: Iterable[int]) -> None:
    lasting, logged, began = target.lasting(), len(target.log()), time.monotonic()
    numbers = list(numbers)
    whole, memory, lastings, descriptors = Outcome(), [], [], []
    with _Bystander(target) as bystander:
        for at in range(PARTS):
            part = numbers[len(numbers) * at // PARTS : len(numbers) * (at + 1) // PARTS]
            whole.add(barrage(target, mutations.inputs(part)))
            memory.append(target.memory() / MIB)
            lastings.append(sum(psutil.Process(pid).memory_full_info().uss for pid in target.lasting()) / MIB)
            descriptors.append(float(target.descriptors()))
            print(target.name, whole.inputs, dict(whole.statuses), f"{memory[-1]:.0f} MB", descriptors[-1], flush=True)
    name = f"{target.name}, {whole.inputs} mutated inputs"
    _report(report, name, whole)
    _unharmed(report, name, target, lasting, logged)
    report.add(f"{name}: time", time.monotonic() - began, None, "s")
    report.add(f"{name}: slowest answer", whole.slowest_s, None, "s")
    report.add(f"{name}: memory of all, growth", _growth(memory), GROWTH_MB + CACHED_MB, "MB")
    report.add(f"{name}: memory less the cores, growth", _growth(lastings), GROWTH_MB, "MB")
    report.add(f"{name}: descriptors, growth", _growth(descriptors), 0)
    report.add(f"{name}: another key's slowest answer", max(bystander.took_s), None, "s")
    report.add(f"{name}: another key's answers that failed", bystander.failed, 0)


def _report(report: Report, name: str, outcome: Outcome) -> None:
    for find in outcome.finds:
        print("FIND", find)
    print(name, dict(outcome.statuses), f"slowest {outcome.slowest_s:.2f} s: {outcome.slowest}", flush=True)
    report.add(f"{name}: answers not documented", len(outcome.finds), 0)


def _unharmed(report: Report, name: str, target: Target, lasting: set[int], logged: int) -> None:
    harm = harm_in(target.log()[logged:])
    for one in harm[:10]:
        print("TRACEBACK", one)
    report.add(f"{name}: tracebacks in the log", len(harm), 0)
    report.add(f"{name}: processes that died", len(lasting - target.lasting()), 0)


class _Bystander:
    """Another key's requests of one token, once a second."""

    def __init__(self, target: Target) -> None:
        self._target, self._ended = target, threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.took_s: list[float] = []
        self.failed = 0

    def __enter__(self) -> _Bystander:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _ask(self) -> None:
        body = json.dumps({"model": "tiny", "prompt": "One", "max_tokens": 1}).encode()
        while not self._ended.wait(BYSTANDER_EVERY_S):
            began = time.monotonic()
            self.failed += self._target.ask("POST", "/v1/completions", body, OTHER_KEY).status != 200
            self.took_s.append(time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
