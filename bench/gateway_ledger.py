"""The gateway with and without its ledger, in turns; and how fast usage is read from a million requests."""

from __future__ import annotations

import re
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

from bench.gateway_candidates import GATEWAY, LEDGER, WITH_LEDGER, Candidate, Candidates
from bench.gateway_figures import Figures
from bench.gateway_load import Load, Work
from bench.gateway_proxies import ANSWER_BYTES, MANY, at, warm
from bench.gateway_stub import instruction
from service.usage import report
from service.usage.database import open_database
from service.usage.ledger import insertion
from service.usage.records import UsageRecord

ROWS, BATCH, KEYS, MODELS, DAYS = 1_000_000, 10_000, 50, 5, 90
_COUNT = re.compile(r"^gateway_(requests|ledger_rows|ledger_lost)_total(?:{[^}]*})? (\S+)$", re.MULTILINE)
_WRITTEN_S = 10.0


def measure(directory: Path, load: Load, figures: Figures, rounds: int) -> None:
    """Compare throughput, rows and memory, then read the usage of a million requests."""
    with Candidates(directory) as candidates:
        both = [candidates.start(name) for name in (GATEWAY, WITH_LEDGER)]
        compare(both, load, figures, rounds, "the ledger")
        figures.at_most("memory with the ledger, after the load", [both[1].memory[0] / 1e6], 64, "MB")
        requests, rows, lost = _counts(both[1])
    figures.at_most("requests that are no rows of the ledger", [abs(requests - _rows(directory / LEDGER))], 0)
    figures.at_most("losses of the ledger", [lost], 0)
    print(f"ledger: {requests:.0f} requests, {rows:.0f} rows, {lost:.0f} lost", flush=True)
    figures.at_most(
        f"usage by key of {ROWS:,} requests", _read_seconds(directory / "million.sqlite3", rounds), 0.5, "s"
    )


def _rows(file: Path) -> int:
    """Return how many rows the ledger has, once the gateway has closed it."""
    database = open_database(file=file)
    count: int = database.read("SELECT count(*) FROM requests")[0][0]
    database.close()
    return count


def compare(both: list[Candidate], load: Load, figures: Figures, rounds: int, what: str) -> None:
    """Compare throughput in turns: of the gateway, and of the gateway with something more."""
    answers = Work(0, "", "", instruction("answer", ANSWER_BYTES), clients=MANY, seconds=1.3, warm_s=0.2)
    streams = replace(answers, message=instruction("stream", 10), stream=True)
    for candidate in both:
        warm(candidate, load)
    for name, work in (("answers", answers), ("streams", streams)):
        speeds: dict[str, list[float]] = {candidate.name: [] for candidate in both}
        for number in range(rounds + 3):
            for candidate in both[:: -1 if number % 2 else 1]:
                speeds[candidate.name].append(load.run(at(candidate, work)).requests_per_s)
        for candidate in both:
            figures.series(f"{candidate.name}: requests/s, c={MANY} {name}", speeds[candidate.name])
        ratios = [on / off for off, on in zip(*speeds.values(), strict=True)]
        figures.at_least(f"requests/s with {what} of those without, {name}", ratios, 0.95)


def _counts(candidate: Candidate) -> tuple[float, float, float]:
    """Return requests, rows and losses by the gateway's own counters, once it has written all rows."""
    deadline = time.monotonic() + _WRITTEN_S
    while True:
        request = urllib.request.Request(f"http://127.0.0.1:{candidate.port}/metrics")
        request.add_header("Authorization", f"Bearer {candidate.key}")
        with urllib.request.urlopen(request, timeout=_WRITTEN_S) as answer:
            text = answer.read().decode()
        counts = dict.fromkeys(("requests", "ledger_rows", "ledger_lost"), 0.0)
        for line in text.splitlines():
            if (found := _COUNT.match(line)) and 'model="-"' not in line:  # its own routes have no model
                counts[found[1]] += float(found[2])
        if counts["requests"] <= counts["ledger_rows"] + counts["ledger_lost"] or time.monotonic() > deadline:
            return counts["requests"], counts["ledger_rows"], counts["ledger_lost"]
        time.sleep(0.1)


def _read_seconds(file: Path, rounds: int) -> list[float]:
    database = open_database(file=file)
    now = time.time()
    for first in range(0, ROWS, BATCH):
        numbers = range(first, first + BATCH)
        database.write(*insertion("bench", {number: _record(number, now) for number in numbers}))
    database.close()
    seconds = []
    for _ in range(rounds):
        began = time.monotonic()
        database = open_database(file=file)
        rows = [*report.usage(database, "key"), *report.operator_rows(database)]
        database.close()
        seconds.append(time.monotonic() - began)
        if sum(row.requests for row in rows) != ROWS:
            raise SystemExit("the sums are not those of all requests")
    return seconds


def _record(number: int, now: float) -> UsageRecord:
    return UsageRecord(
        at=now - (number * 7919 % ROWS) / ROWS * DAYS * 86_400,
        key=f"key-{number % KEYS}",
        model=f"model-{number % MODELS}",
        tokens_in=1000,
        tokens_cached=100,
        tokens_out=200,
        seconds=2.5,
        status=200,
        replica=f"replica-{number % 100}",
        cost=0.001,
        dollars=0.001,
    )
