"""One fault after another, each under load, and what must hold after every one."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from bench.chaos.kinds import KINDS, Kind
from bench.chaos.load import Load, Outcome
from bench.chaos.requests import KEYS
from bench.chaos.site import MODELS, Site, Stopwatch, polled

_BEFORE_S, _AFTER_S = (0.1, 0.4), 0.3  # of load, around a fault
_SLACK_S = 5.0  # beside a boot
_ANSWER_S = 150.0  # beside two boots: within it each request has ended, on a busy machine too
_END_S = 60.0
_SHOWN = 6  # violations of a fault that are printed
_IDLE_S = 5.0
_CAUSES = re.compile(r"^error: .*(was killed by SIGKILL|engine core exited unexpectedly)", re.M)
_RUNNING = re.compile(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", re.M)


@dataclass(frozen=True)
class Fault:
    """One fault of a run; its seed and number determine all that is random in it."""

    seed: int
    number: int
    kind: Kind

    @property
    def rng(self) -> random.Random:
        """Random numbers of its own, whichever faults came before."""
        return random.Random(f"{self.seed} {self.number}")  # noqa: S311 - no secret


@dataclass
class Episode:
    """What happened around one fault.

    Attributes:
        ready_s: How long after the fault all models answered again.
        violations: What must not be.
    """

    fault: Fault
    outcomes: list[Outcome] = field(default_factory=list)
    ready_s: float = 0.0
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return one line, and one for each violation."""
        counts = Counter(outcome.code or "answered" for outcome in self.outcomes)
        told = ", ".join(f"{number} {code}" for code, number in sorted(counts.items()))
        line = f"{self.fault.number:>4} {self.fault.kind.name}: {told}; ready after {max(0.0, self.ready_s):.1f} s"
        more = [f"     and {len(self.violations) - _SHOWN} more"] if len(self.violations) > _SHOWN else []
        return "\n".join([line, *(f"     VIOLATION: {each}" for each in self.violations[:_SHOWN]), *more])


def deck(*, long: bool) -> list[Kind]:
    """Return one round of kinds, each as often as it weighs."""
    return [kind for kind in KINDS for _ in range(kind.weight or int(long))]


def faults(seed: int, *, long: bool) -> Iterator[Fault]:
    """Yield the faults of a seed, without end: every round has the same kinds in another order."""
    number = 0
    while True:
        kinds = deck(long=long)
        random.Random(f"{seed} round {number}").shuffle(kinds)  # noqa: S311 - no secret
        for kind in kinds:
            yield Fault(seed, number, kind)
            number += 1


async def run(site: Site, fault: Fault) -> Episode:
    """Inject a fault under load, and look at everything afterwards. The service is ready before, and afterwards."""
    episode, rng = Episode(fault), fault.rng
    kind, engines, log = fault.kind, site.leader_ids(), AccessLog(site.access_file)
    load = Load(site.url, random.Random(rng.random()), MODELS, limit_s=2 * site.boot_s + _ANSWER_S)  # noqa: S311
    await asyncio.sleep(rng.uniform(*_BEFORE_S))
    try:
        await kind.inject(site, rng)
    except AssertionError as error:
        episode.violations.append(f"{error}")
    watch = Stopwatch(site)
    if kind.ends is not None:
        episode.violations += await asyncio.to_thread(_end_of, site, kind)
        site.spawn()
        watch = Stopwatch(site)
    limit_s = site.boot_s + _SLACK_S + kind.extra_s
    for model in MODELS:
        if not await site.is_ready(rng, model, watch, limit_s):
            took = f"{watch.seconds:.1f} s after the fault, the limit is {limit_s:.1f} s"
            episode.violations.append(f"{model} was not ready in time, {took}{_ended(site)}")
        episode.ready_s = watch.seconds
        if kind.ends is not None:
            watch = Stopwatch(site)  # the second model's boot begins with its first request
    await asyncio.sleep(_AFTER_S)
    episode.outcomes = await load.finish()
    if site.service.ended:
        episode.violations.append(f"the command has ended{_ended(site)}")
        await site.start(rng)
        return episode
    episode.violations += [f"{outcome}" for outcome in episode.outcomes if not _is_allowed(kind, outcome)]
    if kind.ends is None:
        episode.violations += [f"{model}: its engine was replaced" for model in _replaced(site, kind, engines)]
    if kind.ends is None and "disk" not in kind.name:
        # a line is written after the last byte of its answer, which its client may have first
        episode.violations += await asyncio.to_thread(polled, lambda: log.faults_of(episode.outcomes))
    episode.violations += await _still_running(site)
    episode.violations += await asyncio.to_thread(site.left)
    return episode


def _is_allowed(kind: Kind, outcome: Outcome) -> bool:
    if not outcome.code:
        return True
    return outcome.code in kind.tolerates and outcome.request.model in kind.models


def _replaced(site: Site, kind: Kind, before: dict[str, int]) -> list[str]:
    after = site.leader_ids()
    return [model for model in MODELS if model not in kind.replaces and before.get(model) != after.get(model)]


def _end_of(site: Site, kind: Kind) -> list[str]:
    """Wait for the end of the command, and return what is wrong with it."""
    try:
        code = site.service.wait_ended(_END_S)
    except AssertionError:
        return [f"the command had not ended after {_END_S:g} s"]
    wrong = [] if code == kind.ends else [f"the command ended with code {code}, expected {kind.ends}{_ended(site)}"]
    if "Traceback" in site.service.err:
        wrong.append(f"a traceback: {site.service.err[-1000:]}")
    if kind.ends == 1 and not _CAUSES.search(site.service.err):
        wrong.append(f"no cause of death: {site.service.err[-300:]}")
    return wrong + site.left_of_all()


def _ended(site: Site) -> str:
    return f"; it said {site.service.err[-500:]!r}" if site.service.ended else ""


async def _still_running(site: Site) -> list[str]:
    """Return which engines work on a request that nobody waits for."""
    headers = {"Authorization": f"Bearer {KEYS['alice']}"}
    left = []
    async with aiohttp.ClientSession(headers=headers) as http:
        for model in MODELS:
            deadline, running = time.monotonic() + _IDLE_S, 1.0
            try:
                while running and time.monotonic() < deadline:
                    async with http.get(f"{site.url}/metrics", params={"model": model}) as answer:
                        answer.raise_for_status()
                        running = sum(float(number) for number in _RUNNING.findall(await answer.text()))
            except (aiohttp.ClientError, ConnectionError) as error:
                left.append(f"{model}: no metrics, {error!r}")
            if running:
                left.append(f"{model} still works on {running:g} requests after {_IDLE_S:g} s")
    return left


class AccessLog:
    """The service's line of each request, from now on."""

    def __init__(self, file: Path) -> None:
        self._file, self._begin = file, file.stat().st_size

    def faults_of(self, outcomes: list[Outcome]) -> list[str]:
        """Return which requests have not exactly one line, or another status than their client saw."""
        with self._file.open("rb") as log:
            log.seek(self._begin)
            lines = [json.loads(line) for line in log.read().splitlines()]
        seen: dict[str, list[int]] = {}
        for line in lines:
            seen.setdefault(line["id"], []).append(line["status"])
        wrong = []
        for outcome in outcomes:
            statuses = seen.get(outcome.request.marker, [])
            if len(statuses) > 1 or (not statuses and outcome.status):
                wrong.append(f"{len(statuses)} lines in the request log of {outcome}")
            elif not outcome.code and statuses != [200]:
                wrong.append(f"logged with status {statuses[0]}: {outcome}")
        return wrong
