"""The ledger in PostgreSQL, by Debian's package: two gateways, a server that crashes and comes back, memory."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from service.gateway.clients import ClientRegistry
from service.gateway.key_set import KeySource
from service.gateway.live_config import LiveConfig
from service.gateway.router import ModelRouter
from service.registry.models import Registry
from service.usage import report
from service.usage.database import DuplicateRowError, open_database
from service.usage.key_records import DatabaseKeys, KeyConflictError, KeyRecord
from service.usage.keys import Keys
from service.usage.ledger import KEPT_S, Ledger
from service.usage.records import UsageRecord

from .postgresql import Postgresql

MEMORY = """
import service.gateway.local_server, service.local.planner
from service.usage.database import open_database
open_database({url!r})
print(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Postgresql]:
    """Return a running server."""
    with Postgresql() as server:
        yield server


def record(**changes: Any) -> UsageRecord:
    """Return a record."""
    facts: dict[str, Any] = {"at": 7200.5, "key": "alice", "model": "tiny", "seconds": 1.0, "status": 200}
    return UsageRecord(**(facts | changes))


def eventually(true: Callable[[], object], within_s: float = 20) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ledger_of_two_gateways_survives_a_crash_of_the_server(server: Postgresql) -> None:
    """What was recorded meanwhile is written afterwards, once; both add to the sums of the hours, which stay."""
    ledgers = [Ledger(lambda: open_database(server.url), 0.02) for _ in range(2)]
    for ledger in ledgers:
        ledger.start()
    for number in range(300):
        for ledger in ledgers:
            ledger.record(record(key=f"key-{number % 3}", tokens_out=1, dollars=0.5))
    eventually(lambda: all(ledger.written for ledger in ledgers))
    server.stop()
    for ledger in ledgers:
        ledger.record(record(key="meanwhile", tokens_in=7))
    time.sleep(0.5)
    server.start()
    eventually(lambda: all(ledger.written == 301 for ledger in ledgers))
    for ledger in ledgers:
        ledger.close()

    database = open_database(server.url)
    rows = {
        row.name: (row.requests, row.tokens_in, row.tokens_out, row.dollars) for row in report.usage(database, "key")
    }
    assert rows == {"meanwhile": (2, 14, 0, 0.0)} | {f"key-{number}": (200, 0, 200, 100.0) for number in range(3)}
    assert database.read("SELECT count(*) FROM requests") == [(602,)]
    assert [ledger.lost for ledger in ledgers] == [0, 0]
    assert report.unclosed_writers(database, time.time() + 1000) == []
    assert [row.name for row in report.usage(database, "day", key="meanwhile")] == ["1970-01-01"]
    assert report.operator_rows(database) == []

    pruning = Ledger(lambda: open_database(server.url), 0.02, kept_s=KEPT_S)  # all rows are of 1970
    pruning.start()
    eventually(lambda: database.read("SELECT count(*) FROM requests") == [(0,)])
    pruning.close()
    assert database.read("SELECT sum(requests) FROM hours") == [(602,)]
    database.close()


def test_row_that_is_there_is_told_and_the_transaction_undone(server: Postgresql) -> None:
    """As in SQLite."""
    database = open_database(server.url)
    row = ("INSERT INTO writers VALUES (:id, 1, 2, NULL, 0)", [{"id": "twice"}])

    with pytest.raises(DuplicateRowError):
        database.write(row, row)

    assert database.read("SELECT id FROM writers WHERE id = :id", id="twice") == []
    database.close()


def test_memory_of_a_gateway_with_postgresql_is_at_most_96_mb(server: Postgresql) -> None:
    """SQLAlchemy and asyncpg are imported only where they are configured."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY.format(url=server.url)], capture_output=True, text=True, timeout=60, check=True
    )

    assert int(done.stdout) * 1024 <= 96_000_000


def test_keys_and_what_they_have_used_are_seen_by_another_gateway(server: Postgresql) -> None:
    """A key that one makes or revokes is read by the other; two changes of one record at once are told apart."""
    ours, theirs = (DatabaseKeys(lambda: open_database(server.url)) for _ in range(2))
    keys = Keys(ours)
    keys.new("alice", {"tokens_per_day": 100})
    with pytest.raises(KeyConflictError):
        theirs.save(KeyRecord("alice", 1))
    source = KeySource({}, {}, theirs, "tiny")
    registry = Registry.load()
    clients = ClientRegistry.of(source.load_at_start(registry))
    router = ModelRouter(registry, "tiny", lambda *_: pytest.fail("no pool is needed"))
    ledger = Ledger(lambda: open_database(server.url), 0.02)
    ledger.start()
    ledger.record(record(at=time.time(), key="alice", tokens_in=60, tokens_out=50, dollars=0.5))
    eventually(lambda: ledger.written)
    ledger.close()

    async def run() -> None:
        config = LiveConfig(source, clients, router, connect=lambda: open_database(server.url), poll_s=0.05)
        watching = asyncio.create_task(config.watch())
        (alice,) = clients
        async with asyncio.timeout(20):
            while alice.day_tokens.used() != 110:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.02)
            assert alice.month_dollars.used() == 0.5
            await asyncio.to_thread(keys.revoke, "alice")
            while [*clients]:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.02)
        assert clients.needs_key
        watching.cancel()

    asyncio.run(run())
    ours.close()
    theirs.close()
