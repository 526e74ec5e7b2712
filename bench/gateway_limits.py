"""The gateway with its ledger, with and without all limits and a thousand stored keys, in turns."""

from __future__ import annotations

import http.client
from pathlib import Path

import psutil

from bench.gateway_candidates import KEYS, WITH_LEDGER, WITH_LIMITS, Candidate, Candidates
from bench.gateway_figures import Figures
from bench.gateway_ledger import compare
from bench.gateway_load import Load
from service.keys import digest
from service.usage.database import open_database
from service.usage.key_records import DatabaseKeys, KeyRecord, StoredKey

STORED, ANONYMOUS = 1000, 10_000


def measure(directory: Path, load: Load, figures: Figures, rounds: int) -> None:
    """Compare throughput, then memory, and what requests without a key cost."""
    store = DatabaseKeys(lambda: open_database(file=directory / KEYS))
    for number in range(STORED):
        name = f"key-{number}"
        store.save(KeyRecord(name, 1, (StoredKey(digest(name.encode()), 0.0),)))
    store.close()
    with Candidates(directory) as candidates:
        both = [candidates.start(name) for name in (WITH_LEDGER, WITH_LIMITS)]
        compare(both, load, figures, rounds, "limits")
        figures.at_most("memory with limits, after the load", [both[1].memory[0] / 1e6], 64, "MB")
        figures.at_most("processor time of a request without a key", [_anonymous_ms(both[1])], 0.2, "ms")


def _anonymous_ms(candidate: Candidate) -> float:
    process = psutil.Process(candidate.pid)
    connection = http.client.HTTPConnection("127.0.0.1", candidate.port)
    before = sum(process.cpu_times()[:2])
    for _ in range(ANONYMOUS):
        connection.request("POST", "/admin/keys", b"{}", {"Authorization": "Bearer wrong"})
        answer = connection.getresponse()
        answer.read()
        if answer.status != 401:
            raise SystemExit(f"a request without a key was answered {answer.status}")
    connection.close()
    return 1000 * (sum(process.cpu_times()[:2]) - before) / ANONYMOUS
