"""Sums by key, model and day, since when, and the operator's rows."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from service.errors import UsageError
from service.usage import report
from service.usage.database import Database, open_database
from service.usage.ledger import insertion
from service.usage.records import UsageRecord

DAY_S = 86_400.0
NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """Return an open database."""
    database = open_database(file=tmp_path / "usage.sqlite3")
    yield database
    database.close()


def put(database: Database, *records: dict[str, Any]) -> None:
    """Write records."""
    facts: dict[str, Any] = {"at": DAY_S, "key": "alice", "model": "tiny", "seconds": 1.0, "status": 200}
    database.write(*insertion("w", dict(enumerate(UsageRecord(**(facts | one)) for one in records))))


def put_replica(database: Database, **changes: Any) -> None:
    """Write a replica of 3600 dollars an hour: a dollar a second."""
    facts = {"id": "r", "model": "tiny", "gpu": "H100", "price": 3600.0, "start": 0.0, "ready": 10.0, "alive": 100.0}
    database.write(
        (
            "INSERT INTO replicas VALUES (:id, :model, :gpu, :price, :start, :ready, :alive, :end)",
            [facts | {"end": None} | changes],
        )
    )


def test_sums_by_key_begin_with_who_owes_most(database: Database) -> None:
    """A request without tokens counts as none of them."""
    put(database, {"tokens_out": 7}, {"key": "bob", "dollars": 0.5, "cost": 0.25, "status": 500}, {})

    alice, bob = (
        report.UsageRow("alice", 2, 0, 0, 0, 7, 2.0),
        report.UsageRow("bob", 1, 1, 0, 0, 0, 1.0, 0.0, 0.25, 0.5),
    )
    assert report.usage(database, "key") == [bob, alice]
    assert report.usage(database, "key", key="alice") == [alice]
    assert report.total([alice, bob]) == report.UsageRow("total", 3, 1, 0, 0, 7, 3.0, 0.0, 0.25, 0.5)


def test_days_are_those_of_utc_in_their_order(database: Database) -> None:
    """A day begins at midnight."""
    put(database, {"at": 3 * DAY_S}, {"at": 3 * DAY_S - 0.001}, {"at": 0.0})

    assert [(row.name, row.requests) for row in report.usage(database, "day")] == [
        ("1970-01-01", 1),
        ("1970-01-03", 1),
        ("1970-01-04", 1),
    ]


def test_since_begins_with_its_hour(database: Database) -> None:
    """Sums are of whole hours."""
    put(database, {"at": 7199.0, "model": "old"}, {"at": 7200.0, "model": "new"})

    found = report.usage(database, "model", since=datetime.fromtimestamp(9000, UTC))

    assert [row.name for row in found] == ["new"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-01", datetime(2026, 11, 1, tzinfo=UTC)),
        ("2026-11-01T10:30+02:00", datetime(2026, 11, 1, 8, 30, tzinfo=UTC)),
        ("36h", NOW - timedelta(hours=36)),
        ("7d", NOW - timedelta(days=7)),
    ],
)
def test_since_is_a_date_or_how_long_ago(text: str, expected: datetime) -> None:
    """Without an offset it is UTC."""
    assert report.parse_since(text, NOW) == expected


@pytest.mark.parametrize("text", ["", "yesterday", "7w", "-3d", "1e9d", "2026-13-01", "7d\n"])
def test_since_that_is_no_time_is_refused_with_an_example(text: str) -> None:
    """The value and the next step are in the error."""
    with pytest.raises(UsageError, match="Write 2026-11-29, 36h or 7d"):
        report.parse_since(text, NOW)


def test_by_something_else_is_refused() -> None:
    """It would be a column of the operator's choice."""
    with pytest.raises(UsageError, match="none of key, model, day"):
        report.parse_by("hour; DROP TABLE hours")


def test_wakes_and_waiting_replicas_are_the_operators(database: Database) -> None:
    """What replicas cost is what callers used, the wakes, and the rest."""
    put_replica(database)
    put_replica(database, id="ended", start=200.0, ready=205.0, alive=230.0, end=240.0)
    put_replica(database, id="failed", start=300.0, ready=None, alive=301.0)
    put(database, {"at": 50.0, "cost": 20.0, "dollars": 99.0})

    wake, idle = report.operator_rows(database)

    assert (wake.name, wake.seconds, wake.cost) == ("(wake)", 16.0, pytest.approx(16.0))
    assert (idle.name, idle.seconds, idle.cost) == ("(idle)", 125.0, pytest.approx(105.0))
    assert wake.dollars == idle.dollars == 0


def test_replicas_before_the_interval_cost_nothing_in_it(database: Database) -> None:
    """Of one that runs into it, only that part."""
    put_replica(database)
    put_replica(database, id="later", start=3500.0, ready=3700.0, alive=4000.0)

    wake, idle = report.operator_rows(database, datetime.fromtimestamp(3600, UTC))

    assert (wake.seconds, idle.seconds) == (100.0, 300.0)


def test_machine_without_replica_records_has_no_operators_rows(database: Database) -> None:
    """A machine of one's own has no price."""
    assert report.operator_rows(database) == []


def test_writers_that_were_killed_are_found(database: Database) -> None:
    """One that was seen a moment ago runs."""
    rows = [("killed", 100.0, None), ("closed", 100.0, 101.0), ("runs", 990.0, None)]
    sql = "INSERT INTO writers VALUES (:id, 0, :alive, :closed, 2)"
    database.write((sql, [{"id": name, "alive": alive, "closed": closed} for name, alive, closed in rows]))

    assert report.unclosed_writers(database, now=1000.0) == [("killed", 100.0)]
    assert report.lost(database) == 6
