"""What was used and what it cost, by key, by model or by day: sums of whole hours, read from the database."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal, get_args

from service.errors import UsageError
from service.usage.database import Database

By = Literal["key", "model", "day"]
WAKE, IDLE = "(wake)", "(idle)"  # rows of the operator: no key or model has such a name
_COLUMNS = {"key": "key", "model": "model", "day": "hour / 24"}
_COUNTS = ("requests", "errors", "tokens_in", "tokens_cached", "tokens_out")
_AMOUNTS = ("seconds", "held_s", "cost", "dollars")
_SUMS = ", ".join(
    [*(f"CAST(sum({name}) AS BIGINT)" for name in _COUNTS), *(f"sum({name})" for name in _AMOUNTS)]  # a row's fields
)
_BY_WEIGHT = "sum(dollars) DESC, sum(cost) DESC, sum(tokens_out) DESC, sum(requests) DESC, 1"
_HOUR_S = 3600
_AGO = re.compile(r"(\d{1,5})([hd])")


@dataclass(frozen=True)
class Page:
    """A part of the rows."""

    limit: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class UsageRow:
    """The sums of one key, model or day; or what the replicas cost that no caller used.

    Attributes:
        errors: Those of `requests` whose status was 400 or above.
        tokens_in: Cached ones included.
        seconds: Of requests: from the first byte to the end of the answer; of the operator's rows: of replicas.
        cost: What of the replicas' price is theirs, in dollars.
        dollars: What callers owe.
    """

    name: str
    requests: int = 0
    errors: int = 0
    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    held_s: float = 0.0
    cost: float = 0.0
    dollars: float = 0.0

    def as_object(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self)


def parse_by(text: str) -> By:
    """Return what to sum by.

    Raises:
        UsageError: It is none of the three.
    """
    for known in get_args(By):
        if text == known:
            by: By = known
            return by
    raise UsageError(f"by='{text[:40]}' is none of {', '.join(get_args(By))}.", hint="Write by=key.")


def parse_since(text: str, now: datetime) -> datetime:
    """Return the beginning of an interval: a date, a time, or how long ago (`36h`, `7d`); without an offset it is UTC.

    Raises:
        UsageError: It is none of these.
    """
    if match := _AGO.fullmatch(text):
        hours = int(match[1]) * (24 if match[2] == "d" else 1)
        return now - timedelta(hours=hours)
    try:
        since = datetime.fromisoformat(text)
        since = since if since.tzinfo else since.replace(tzinfo=UTC)
        since.timestamp()
    except (ValueError, OverflowError):
        raise UsageError(
            f"since='{text[:40]}' is neither a date nor how long ago.", hint="Write 2026-11-29, 36h or 7d."
        ) from None
    return since


def usage(
    database: Database, by: By, since: datetime | None = None, key: str | None = None, page: Page | None = None
) -> list[UsageRow]:
    """Return the sums of requests, those that cost most first; days in their order.

    Args:
        database: Where they are.
        by: What a row is.
        since: From the hour in which this is; None: from the beginning.
        key: Only those of this key; None: of all.
        page: Which of the rows; None: all.
    """
    column, (where, parameters) = _COLUMNS[by], _conditions(since, key)
    order = "1" if by == "day" else _BY_WEIGHT
    rows = f"SELECT {column}, {_SUMS} FROM hours{where} GROUP BY 1 ORDER BY {order}"  # noqa: S608 - constants
    if page:
        rows, parameters = f"{rows} LIMIT :limit OFFSET :offset", {**parameters, **asdict(page)}
    return [UsageRow(_name(by, first), *rest) for first, *rest in database.read(rows, **parameters)]


def usage_total(database: Database, since: datetime | None = None, key: str | None = None) -> UsageRow:
    """Return the sum of the rows that `usage` returns."""
    where, parameters = _conditions(since, key)
    (found,) = database.read(f"SELECT {_SUMS} FROM hours{where}", **parameters)  # noqa: S608 - constants
    return UsageRow("total", *(value or 0 for value in found))


def _conditions(since: datetime | None, key: str | None) -> tuple[str, dict[str, Any]]:
    conditions, parameters = [], dict[str, Any]()
    if since:
        conditions.append("hour >= :hour")
        parameters["hour"] = _hour(since)
    if key is not None:
        conditions.append("key = :key")
        parameters["key"] = key
    return (f" WHERE {' AND '.join(conditions)}" if conditions else ""), parameters


def operator_rows(database: Database, since: datetime | None = None) -> list[UsageRow]:
    """Return what replicas cost that no caller used: their wakes, and the time in which they waited.

    The first counts from a replica's start until it was ready. The second is the rest of what it cost, less what the
    requests cost: also those that died with their replica, for which nobody pays.
    """
    start = _hour(since) * _HOUR_S if since else 0
    replicas = database.read(
        "SELECT dollars_per_hour, started_at, ready_at, alive_at, ended_at FROM replicas WHERE alive_at >= :start",
        start=float(start),
    )
    wake_s = wake = running_s = running = 0.0
    for price, started_at, ready_at, alive_at, ended_at in replicas:
        end = alive_at if ended_at is None else ended_at
        ready = end if ready_at is None else ready_at
        seconds, waking_s = _seconds(started_at, end, start), _seconds(started_at, ready, start)
        running_s, wake_s = running_s + seconds, wake_s + waking_s
        running += seconds * (price or 0.0) / _HOUR_S
        wake += waking_s * (price or 0.0) / _HOUR_S
    if not replicas:
        return []
    used = sum(row.cost for row in usage(database, "model", since))
    idle = UsageRow(IDLE, seconds=running_s - wake_s, cost=max(0.0, running - wake - used))
    return [UsageRow(WAKE, seconds=wake_s, cost=wake), idle]


def _seconds(begin: float, end: float, start: float) -> float:
    return max(0.0, end - max(begin, start))


def unclosed_writers(
    database: Database, now: float, since: datetime | None = None, silent_s: float = 90.0
) -> list[tuple[str, float]]:
    """Return id and last sign of life of processes that were killed: what they had not written is lost."""
    found = database.read(
        "SELECT id, alive_at FROM writers WHERE closed_at IS NULL AND alive_at BETWEEN :first AND :last ORDER BY 2",
        first=since.timestamp() if since else 0.0,
        last=now - silent_s,
    )
    return [(name, alive_at) for name, alive_at in found]


def lost(database: Database) -> int:
    """Return how many records were lost since they could not be written in time."""
    return sum(count for (count,) in database.read("SELECT lost FROM writers"))


def total(rows: Iterable[UsageRow]) -> UsageRow:
    """Return the sum of rows."""
    columns = [list(asdict(row).values())[1:] for row in rows]
    return UsageRow("total", *(sum(column) for column in zip(*columns, strict=True)))


def _hour(at: datetime) -> int:
    return int(at.timestamp() // _HOUR_S)


def _name(by: By, value: Any) -> str:
    return (date(1970, 1, 1) + timedelta(days=value)).isoformat() if by == "day" else str(value)
