"""The ledger: takes a record of each request and writes it to the database, in batches, on a thread of its own.

Taking a record costs an append. Where the database is slow, full or gone, records wait in a bounded queue; beyond it
they are lost, which is counted and told. Nothing here slows or fails a request.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from service.boots.records import new_id
from service.errors import ServiceError
from service.usage.database import Database, DuplicateRowError, Row, Statement
from service.usage.records import UsageRecord

MOST_WAITING = 20_000  # records: 6 MB; at 1,000 requests a second a database may be gone for 20 s
INTERVAL_S = 0.5  # what a killed process loses at most
KEPT_S = 90 * 86_400.0  # of each request a row: a million take 0.12 GB; the sums of the hours stay for ever
_ALIVE_S = 30.0
_LONGEST_RETRY_S = 5.0
_BATCH = 1000  # rows of one transaction: about 3 ms, in which other threads run too
_PRUNING_S = 86_400.0  # a look at all rows, of which a million take 0.1 s
_PRUNED = 5000  # rows of one transaction
_log = logging.getLogger(__name__)

_COLUMNS = ("writer", "number", *UsageRecord.__struct_fields__)
_REQUEST = f"INSERT INTO requests ({', '.join(_COLUMNS)}) VALUES ({', '.join(f':{name}' for name in _COLUMNS)})"  # noqa: S608
_SUMS = ("requests", "errors", "tokens_in", "tokens_cached", "tokens_out", "seconds", "held_s", "cost", "dollars")
_HOUR = (
    f"INSERT INTO hours (hour, key, model, {', '.join(_SUMS)}) "  # noqa: S608 - constants
    f"VALUES (:hour, :key, :model, {', '.join(f':{name}' for name in _SUMS)}) ON CONFLICT (hour, key, model) "
    f"DO UPDATE SET {', '.join(f'{name} = hours.{name} + excluded.{name}' for name in _SUMS)}"
)
_STARTED = (
    "INSERT INTO writers (id, started_at, alive_at, closed_at, lost) VALUES (:id, :at, :at, NULL, 0) "
    "ON CONFLICT DO NOTHING"
)
_ALIVE = "UPDATE writers SET alive_at = :at, lost = :lost WHERE id = :id"
_CLOSED = "UPDATE writers SET alive_at = :at, closed_at = :at, lost = :lost WHERE id = :id"

# Rows of gateways that wrote into this database: one that came from a file and is gone would be taken and summed again.
_OLD = (
    "FROM requests WHERE at < :before AND writer IN (SELECT id FROM writers) "
    "AND writer NOT IN (SELECT id FROM file_writers) LIMIT :most"
)
_COUNT_OLD = f"SELECT count(*) FROM (SELECT 1 {_OLD}) AS old"  # noqa: S608 - constants
_PRUNE = f"DELETE FROM requests WHERE (writer, number) IN (SELECT writer, number {_OLD})"  # noqa: S608 - constants


def insertion(writer: str, records: Mapping[int, UsageRecord]) -> list[Statement]:
    """Return the statements that write records, as rows and into the sums of their hours.

    Args:
        writer: Id of the process whose records they are.
        records: At least one, by the numbers that the process gave them.
    """
    rows = [(writer, number, *msgspec.structs.astuple(record)) for number, record in records.items()]
    return [(_REQUEST, rows), (_HOUR, _sums(records.values()))]


def _sums(records: Iterable[UsageRecord]) -> list[dict[str, Any]]:
    hours: dict[tuple[int, str, str], dict[str, Any]] = {}
    for one in records:
        key = (one.hour, one.key, one.model)
        if (sums := hours.get(key)) is None:
            sums = hours[key] = {"hour": one.hour, "key": one.key, "model": one.model, **dict.fromkeys(_SUMS, 0)}
        sums["requests"] += one.is_request
        sums["errors"] += one.status >= 400
        sums["tokens_in"] += one.tokens_in or 0
        sums["tokens_cached"] += one.tokens_cached or 0
        sums["tokens_out"] += one.tokens_out or 0
        sums["seconds"] += one.seconds
        sums["held_s"] += one.held_s
        sums["cost"] += one.cost or 0.0
        sums["dollars"] += one.dollars or 0.0
    return [hours[key] for key in sorted(hours)]  # in one order, so that two writers never wait for each other


class Shared(Protocol):
    """What exchanges rows with other processes, on the ledger's thread. See `shared.SharedLedger`."""

    def begin(self, writer: str) -> None:
        """Begin, with the id of this process."""

    def add(self, records: Sequence[UsageRecord]) -> None:
        """Take rows that were written."""

    def sync(self, database: Database, writer: str, lost: int, *, closing: bool) -> None:
        """Exchange rows, if it is time."""


class Ledger:
    """Takes records from any thread, from `start` to `close`.

    Args:
        connect: Opens the database; called on the ledger's thread, again after a failure.
        interval_s: Between two batches.
        most_waiting: Records that may wait.
        shared: Also gets the rows; None: only the database does.
        kept_s: How long the database keeps a row; None: for ever.

    Attributes:
        connect: Opens the database, for readers too.
        written: Rows that are in the database.
        lost: Records that are in none.
    """

    def __init__(
        self,
        connect: Callable[[], Database],
        interval_s: float = INTERVAL_S,
        most_waiting: int = MOST_WAITING,
        shared: Shared | None = None,
        kept_s: float | None = None,
    ) -> None:
        self.connect, self._interval_s, self._most = connect, interval_s, most_waiting
        self._shared, self._kept_s = shared, kept_s
        self._prune_at = float("-inf")
        self._waiting: deque[UsageRecord] = deque()
        self._database: Database | None = None
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_started = False
        self._alive_at = 0.0
        self._failing_since: float | None = None
        self._lost_told = 0
        self.id = new_id()
        self.written = self.lost = 0
        if shared:
            shared.begin(self.id)

    def start(self) -> None:
        """Begin to write."""
        self._thread = threading.Thread(target=self._run, name="usage-ledger", daemon=True)
        self._thread.start()

    def record(self, record: UsageRecord) -> None:
        """Take the record of a request that has ended; never blocks or raises."""
        if len(self._waiting) >= self._most:
            self.lost += 1
        else:
            self._waiting.append(record)

    @property
    def waiting(self) -> int:
        """How many records are not written yet."""
        return len(self._waiting)

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what waits, if that is possible within the time, and end. Blocks."""
        self._ending.set()
        if self._thread:
            self._thread.join(timeout_s)
        if self._waiting:
            self.lost += len(self._waiting)
            _log.error("%d records of requests were not written to the ledger and are lost.", len(self._waiting))

    def _run(self) -> None:
        pause_s = self._interval_s
        while not self._ending.wait(pause_s):
            pause_s = self._interval_s if self._flush() else min(2 * pause_s, _LONGEST_RETRY_S)
        self._flush(closing=True)
        if self._database:
            self._database.close()

    def _flush(self, *, closing: bool = False) -> bool:
        """Write what waits; false: that failed, and is tried again."""
        try:
            database = self._open()
            while self._waiting:
                self._write_batch(database)
            if closing or time.monotonic() - self._alive_at >= _ALIVE_S:
                self._write_alive(database, _CLOSED if closing else _ALIVE)
            if self._shared:
                self._shared.sync(database, self.id, self.lost, closing=closing)
            if self._kept_s is not None and not closing and time.monotonic() >= self._prune_at:
                self._prune(database, time.time() - self._kept_s)
        except Exception as error:  # noqa: BLE001 - whatever a database does, requests are served
            self._note_failure(error)
            return False
        self._note_success()
        return True

    def _open(self) -> Database:
        if self._database is None:
            self._database = self.connect()
            if not self._is_started:
                _tell_unclosed(self._database.read("SELECT id, alive_at FROM writers WHERE closed_at IS NULL"))
            started: Statement = (_STARTED, [{"id": self.id, "at": time.time()}])  # the database may be a new one
            self._database.write(started)
            self._is_started, self._alive_at = True, time.monotonic()
        return self._database

    def _write_batch(self, database: Database) -> None:
        batch = [self._waiting[index] for index in range(min(_BATCH, len(self._waiting)))]
        alive: Statement = (_ALIVE, [{"id": self.id, "at": time.time(), "lost": self.lost}])
        try:
            database.write(*insertion(self.id, dict(enumerate(batch, self.written + 1))), alive)
        except DuplicateRowError:  # the connection broke off after the commit of an earlier attempt
            _log.info("A batch of %d records was in the ledger already.", len(batch))
        self._alive_at = time.monotonic()
        self.written += len(batch)
        for _ in batch:
            self._waiting.popleft()
        if self._shared:
            self._shared.add(batch)

    def _write_alive(self, database: Database, sql: str) -> None:
        database.write((sql, [{"id": self.id, "at": time.time(), "lost": self.lost}]))
        self._alive_at = time.monotonic()

    def _prune(self, database: Database, before: float) -> None:
        """Remove some rows that are older; while there are more, the next flush goes on."""
        ((count,),) = database.read(_COUNT_OLD, before=before, most=_PRUNED)
        if count:
            database.write((_PRUNE, [{"before": before, "most": _PRUNED}]))
        if count < _PRUNED:
            self._prune_at = time.monotonic() + _PRUNING_S

    def _note_failure(self, error: Exception) -> None:
        if self._database:
            self._database.close()  # the next attempt opens it anew: its file or its server may be another one
            self._database = None
        if self._failing_since is None:
            self._failing_since = time.monotonic()
            reason = str(error) if isinstance(error, ServiceError) else f"{type(error).__name__}: {error}"
            _log.error(
                "The ledger cannot be written: %s Requests are served; their records wait, up to %d.",
                reason,
                self._most,
            )
        self._tell_losses()

    def _note_success(self) -> None:
        if self._failing_since is not None:
            _log.warning("The ledger is written again after %.0f s.", time.monotonic() - self._failing_since)
            self._failing_since = None
        self._tell_losses()

    def _tell_losses(self) -> None:
        if self.lost > self._lost_told:
            _log.error("%d records of requests are lost: the ledger could not be written in time.", self.lost)
            self._lost_told = self.lost


def _tell_unclosed(writers: Sequence[Row]) -> None:
    """Say that earlier processes were killed, or still run."""
    for name, alive_at in writers:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(alive_at))
        _log.warning(
            "The ledger's writer %s was last seen at %s UTC and did not close the ledger: if it no longer runs, the "
            "requests of its last second are not in it.",
            name,
            at,
        )
