"""A series of faults against one service, and the figures of what became of it."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.chaos.run import Episode, Fault, faults, run
from bench.chaos.site import Site
from bench.report import Report

_SITES = 4  # of a long run


async def run_all(
    chosen: list[Fault], *, short: bool, seconds: float = float("inf"), sites: int = 1
) -> tuple[list[Episode], list[str]]:
    """Run these faults, with a line on each and how to run it again if it violated something.

    Args:
        chosen: The faults.
        short: Whether they are of a short deck; it is part of how to run one again.
        seconds: No fault begins after so many.
        sites: Services that they are divided among. A fault mostly waits, for a boot or for what it has paused.

    Returns:
        What happened, and what is left at the end.
    """
    deadline = time.monotonic() + seconds
    parts = [part for number in range(sites) if (part := chosen[number::sites])]
    done = await asyncio.gather(*(_run_at_one(part, short=short, deadline=deadline) for part in parts))
    return [episode for episodes, _ in done for episode in episodes], [each for _, left in done for each in left]


async def _run_at_one(chosen: list[Fault], *, short: bool, deadline: float) -> tuple[list[Episode], list[str]]:
    episodes: list[Episode] = []
    with TemporaryDirectory(prefix="chaos-") as directory, Site(Path(directory)) as site:
        await site.start(chosen[0].rng)
        print(f"seed {chosen[0].seed}: {len(chosen)} faults; a boot takes {site.boot_s:.1f} s", flush=True)
        for fault in chosen:
            if time.monotonic() > deadline:
                break
            episodes.append(await run(site, fault))
            print(episodes[-1], flush=True)
            if episodes[-1].violations:
                again = f"python -m bench.chaos --seed {fault.seed} --only {fault.number}{' --short' * short}"
                print(f"     again: {again}", flush=True)
        left = await asyncio.to_thread(site.stop)
    for each in left:
        print(f"VIOLATION at the end: {each}")
    return episodes, left


def run_many(number: int, seed: int) -> tuple[list[Episode], list[str], float]:
    """Run so many faults of every kind at two services; return what happened, what is left, and the seconds; blocks."""
    began = time.monotonic()
    chosen = [*islice(faults(seed, long=True), number)]
    return *asyncio.run(run_all(chosen, short=False, sites=_SITES)), time.monotonic() - began


def add_figures(report: Report, episodes: list[Episode], left: list[str], seconds: float) -> None:
    """Report what became of these faults."""
    outcomes = [outcome for episode in episodes for outcome in episode.outcomes]
    violations = sum(len(episode.violations) for episode in episodes) + len(left)
    kinds = {episode.fault.kind.name for episode in episodes}
    boots = [each.ready_s for each in episodes if each.fault.kind.replaces or each.fault.kind.ends is not None]
    name = f"{len(episodes)} faults of {len(kinds)} kinds"
    report.add(f"{name}: violations", violations, 0)
    report.add(f"{name}: requests meanwhile", len(outcomes))
    report.add(f"{name}: of these answered right", sum(not outcome.code for outcome in outcomes))
    report.add(f"{name}: slowest boot, had it the processor", max(boots, default=0.0), None, "s")
    report.add(f"{name}: time", seconds, None, "s")
    report.add("load of the machine, average of 15 minutes", os.getloadavg()[2])
    report.add(f"{name}: time of processors", time.process_time() + _of_children(), None, "s")


def _of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
