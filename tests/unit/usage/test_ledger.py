"""The ledger: batches, sums, failures of the database, losses, and what a killed process leaves behind."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.usage import ledger as ledger_module
from service.usage import report
from service.usage.database import Database, DatabaseError, open_database
from service.usage.ledger import KEPT_S, Ledger, insertion
from service.usage.records import UsageRecord
from service.usage.shared import SharedLedger
from service.usage.writer_files import GatewayRecord, Segments, write_record

INTERVAL_S = 0.01
RECORDS = """
import sys, time
from pathlib import Path
from service.usage.database import open_database
from service.usage.ledger import Ledger
from service.usage.records import UsageRecord

ledger = Ledger(lambda: open_database(file=Path(sys.argv[1])))
ledger.start()
while True:
    print(time.monotonic(), flush=True)
    ledger.record(UsageRecord(at=1.0, key="k", model="m", seconds=1.0, status=200))
    time.sleep(0.01)
"""


class Flaky:
    """A database that can be made to fail, before or after its commit.

    Args:
        database: Where it writes to.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.fails = self.fails_after_commit = False

    def write(self, *statements: Any) -> None:
        """Write, unless it fails."""
        if self.fails:
            raise DatabaseError("The database is gone.", hint="Wait.")
        self._database.write(*statements)
        if self.fails_after_commit and len(statements) > 1:
            self.fails_after_commit = False
            raise DatabaseError("The connection broke off.")

    def read(self, sql: str, **parameters: Any) -> list[tuple[Any, ...]]:
        """Read, unless it fails."""
        if self.fails:
            raise DatabaseError("The database is gone.")
        return self._database.read(sql, **parameters)

    def has_table(self, name: str) -> bool:
        """Tell whether a table is there."""
        return self._database.has_table(name)

    def close(self) -> None:
        """Stay open: the ledger opens it again."""


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """Return an open database."""
    database = open_database(file=tmp_path / "usage.sqlite3")
    yield database
    database.close()


@pytest.fixture
def flaky(database: Database) -> Flaky:
    """Return a database that can be made to fail."""
    return Flaky(database)


@contextmanager
def running(database: Database, most_waiting: int = 1000) -> Iterator[Ledger]:
    """Run a ledger on a database that stays open."""
    ledger = Ledger(lambda: database, INTERVAL_S, most_waiting)
    ledger.start()
    try:
        yield ledger
    finally:
        ledger.close()


def record(**changes: Any) -> UsageRecord:
    """Return a record."""
    facts: dict[str, Any] = {"at": 7200.5, "key": "alice", "model": "tiny", "seconds": 1.0, "status": 200}
    return UsageRecord(**(facts | changes))


def eventually(true: Callable[[], object]) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + 5
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_records_become_rows_and_sums_of_their_hours(flaky: Flaky, database: Database) -> None:
    """A supplement counts its tokens, and no request."""
    with running(flaky) as ledger:
        ledger.record(record(tokens_in=10, tokens_cached=4, tokens_out=5, cost=0.25, dollars=0.5))
        ledger.record(record(status=499, held_s=0.5))
        ledger.record(record(status=0, seconds=0.0, tokens_in=3, tokens_cached=0, tokens_out=2))
        ledger.record(record(at=10_800.0, key="bob"))

    assert ledger.written == 4
    assert database.read("SELECT number, key, status FROM requests ORDER BY number") == [
        (1, "alice", 200),
        (2, "alice", 499),
        (3, "alice", 0),
        (4, "bob", 200),
    ]
    assert database.read("SELECT * FROM hours ORDER BY hour") == [
        (2, "alice", "tiny", 2, 1, 13, 4, 7, 2.0, 0.5, 0.25, 0.5),
        (3, "bob", "tiny", 1, 0, 0, 0, 0, 1.0, 0.0, 0.0, 0.0),
    ]


def test_database_that_is_gone_for_a_while_gets_all_records_afterwards(
    flaky: Flaky, database: Database, warnings: Callable[[], list[str]]
) -> None:
    """They wait meanwhile; the failure and its end are told once each."""
    with running(flaky) as ledger:
        flaky.fails = True
        for _ in range(50):
            ledger.record(record())
        eventually(warnings)
        flaky.fails = False
        eventually(lambda: ledger.written == 50)

    assert database.read("SELECT count(*) FROM requests") == [(50,)]
    assert ledger.lost == 0
    failure, recovery = warnings()
    assert failure.startswith("The ledger cannot be written: The database is gone. Requests are served")
    assert recovery.startswith("The ledger is written again after")


def test_records_beyond_the_queue_are_counted_as_lost_and_told(
    flaky: Flaky, database: Database, warnings: Callable[[], list[str]]
) -> None:
    """Memory is bounded, and the count is in the database once it is back."""
    with running(flaky, most_waiting=10) as ledger:
        flaky.fails = True
        eventually(lambda: not ledger.waiting)
        for _ in range(25):
            ledger.record(record())
        assert (ledger.waiting, ledger.lost) == (10, 15)
        flaky.fails = False
        eventually(lambda: ledger.written == 10)

    assert database.read("SELECT lost FROM writers") == [(15,)]
    assert any(line.startswith("15 records of requests are lost") for line in warnings())


def test_batch_whose_commit_was_not_confirmed_is_counted_once(flaky: Flaky, database: Database) -> None:
    """The connection broke off after the commit: the second attempt finds the rows there."""
    with running(flaky) as ledger:
        flaky.fails_after_commit = True
        ledger.record(record(tokens_out=5))
        eventually(lambda: ledger.written == 1)
        ledger.record(record(tokens_out=7))
        eventually(lambda: ledger.written == 2)

    assert database.read("SELECT count(*), sum(tokens_out) FROM requests") == [(2, 12)]
    assert database.read("SELECT requests, tokens_out FROM hours") == [(2, 12)]


def test_records_that_never_found_a_database_are_lost_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """A service that ends waits for no database, and says what is missing."""

    def connect() -> Database:
        raise DatabaseError("Nothing is there.")

    caplog.set_level(logging.ERROR)
    ledger = Ledger(connect, INTERVAL_S)
    ledger.start()
    ledger.record(record())
    ledger.close()

    assert ledger.lost == 1
    assert "1 records of requests were not written" in caplog.text


def test_writer_that_was_killed_is_told_by_the_next_one(database: Database, warnings: Callable[[], list[str]]) -> None:
    """It did not close the ledger; one that did is not mentioned."""
    with running(Flaky(database)) as first:
        first.record(record())
    database.write(("INSERT INTO writers VALUES ('killed', 0, 86400, NULL, 0)", [{}]))

    with running(Flaky(database)) as second:
        second.record(record())

    assert [line for line in warnings() if "did not close" in line] == [
        "The ledger's writer killed was last seen at 1970-01-02 00:00:00 UTC and did not close the ledger: if it no "
        "longer runs, the requests of its last second are not in it."
    ]
    assert database.read("SELECT count(*) FROM writers WHERE closed_at IS NULL") == [(1,)]


def test_clock_that_is_set_back_loses_no_record(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Durations and intervals are those of a clock that nobody sets."""
    with running(Flaky(database)) as ledger:
        ledger.record(record())
        eventually(lambda: ledger.written == 1)
        monkeypatch.setattr(time, "time", lambda: 1000.0)
        ledger.record(record(at=1000.0))
        eventually(lambda: ledger.written == 2)

    assert database.read("SELECT hour, requests FROM hours ORDER BY hour") == [(0, 1), (2, 1)]


def test_old_rows_are_removed_and_their_sums_stay(
    flaky: Flaky, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces, beside the requests; those that come from a replica's file stay, since they would be taken again."""
    monkeypatch.setattr(ledger_module, "_PRUNED", 2)
    now = time.time()
    database.write(*insertion("replica", {1: record(status=0)}))
    with running(flaky) as first:
        for age_s in (KEPT_S + 60, KEPT_S + 50, KEPT_S + 40, KEPT_S - 60, 0):
            first.record(record(at=now - age_s))
    second = Ledger(lambda: flaky, INTERVAL_S, kept_s=KEPT_S)
    second.start()
    eventually(lambda: database.read("SELECT count(*) FROM requests") == [(3,)])
    second.close()

    assert database.read("SELECT writer, number FROM requests ORDER BY number") == [
        ("replica", 1),
        (first.id, 4),
        (first.id, 5),
    ]
    assert database.read("SELECT sum(requests) FROM hours") == [(5,)]


def test_old_rows_that_came_from_a_file_count_once_however_often_it_is_read(database: Database, tmp_path: Path) -> None:
    """Such as those of a gateway before the service had a server as its database: each start reads its files again."""
    segments = Segments(tmp_path / "volume", "before")
    segments.add([record(at=time.time() - KEPT_S - 60)])
    segments.write(closing=True)
    write_record(tmp_path / "volume", GatewayRecord(id="before", started_at=0.0, alive_at=1.0, closed_at=1.0))

    def run() -> None:
        shared = SharedLedger(tmp_path / "volume", lambda: None, exports=False)
        ledger = Ledger(lambda: Flaky(database), INTERVAL_S, shared=shared, kept_s=KEPT_S)
        ledger.start()
        eventually(lambda: ledger._prune_at > 0)
        ledger.close()

    run()
    run()
    assert database.read("SELECT sum(requests) FROM hours") == [(1,)]
    assert database.read("SELECT writer, number FROM requests") == [("before", 1)]


def test_file_that_is_removed_is_made_again(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    """Rows in a removed file would be read by nobody."""
    file = tmp_path / "usage.sqlite3"
    ledger = Ledger(lambda: open_database(file=file), INTERVAL_S)
    ledger.start()
    ledger.record(record())
    eventually(lambda: ledger.written == 1)
    for path in tmp_path.glob("usage*"):
        path.unlink()
    ledger.record(record(key="bob"))
    eventually(lambda: ledger.written == 2)
    ledger.close()

    database = open_database(file=file)
    assert database.read("SELECT number, key FROM requests") == [(2, "bob")]
    assert database.read("SELECT count(*) FROM writers WHERE closed_at IS NOT NULL") == [(1,)]
    assert any("cannot be used" in line for line in warnings())
    database.close()


def test_process_that_is_killed_loses_what_it_recorded_in_its_last_second(tmp_path: Path) -> None:
    """And nothing before; the next one says so."""
    file = tmp_path / "usage.sqlite3"
    with subprocess.Popen([sys.executable, "-c", RECORDS, str(file)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        recorded = []
        for line in process.stdout:
            recorded.append(float(line))
            if recorded[-1] - recorded[0] > 2:
                process.kill()
                break
    database = open_database(file=file)
    (rows,) = database.read("SELECT count(*) FROM requests")

    assert rows[0] >= sum(at < recorded[-1] - 1 for at in recorded) > 50
    assert len(report.unclosed_writers(database, time.time(), silent_s=0)) == 1
    database.close()
