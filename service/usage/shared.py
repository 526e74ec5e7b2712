"""The exchange of usage through the files on a volume: a gateway's own rows, and those of other processes.

Readers put files into their own database; a row that is there already is skipped. `writer_files` has what is written.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import msgspec

from service.usage.database import Database, Statement
from service.usage.ledger import insertion
from service.usage.records import UsageRecord
from service.usage.writer_files import (
    GATEWAYS,
    INTERVAL_S,
    REPLICAS,
    REQUESTS,
    GatewayRecord,
    ReplicaRecord,
    Segments,
    write_record,
)

_IMPORT_S = 0.1  # of half a second
_FROM_FILE = "INSERT INTO file_writers (id) VALUES (:id) ON CONFLICT DO NOTHING"
_NAME = re.compile(rf"{REQUESTS}/(\w+)-\d+-(\d+)\.jsonl")  # writer, number of the last row


class SharedLedger:
    """A gateway's part of the volume: exports its own rows, and takes those of others into its database.

    Args:
        directory: That of all usage on the volume.
        commit: Makes files visible to others, and theirs to this process; blocks.
        exports: Whether its rows go to the volume; not where its database is a server that all share.
        interval_s: Between two commits.
    """

    def __init__(
        self, directory: Path, commit: Callable[[], None], *, exports: bool = True, interval_s: float = INTERVAL_S
    ) -> None:
        self._directory, self._commit, self._exports, self._interval_s = directory, commit, exports, interval_s
        self._segments: Segments | None = None
        self._imported: set[str] = set()
        self._incoming: Iterator[tuple[str, bytes]] = iter(())
        self._started_at, self._synced_at = time.time(), float("-inf")

    def begin(self, writer: str) -> None:
        """Begin to export the rows of this process."""
        self._segments = Segments(self._directory, writer) if self._exports else None

    def add(self, records: Sequence[UsageRecord]) -> None:
        """Take rows that are in this process's database."""
        if self._segments:
            self._segments.add(records)

    def sync(self, database: Database, writer: str, lost: int, *, closing: bool) -> None:
        """Export and import, if it is time.

        Raises:
            Exception: The volume cannot be used; nothing is lost, the next call tries again.
        """
        if closing or time.monotonic() - self._synced_at >= self._interval_s:
            self._export(writer, lost, closing=closing)
            self._incoming = iter(files_in(self._directory, self._imported, own=writer))
            self._synced_at = time.monotonic()
        if not closing:
            self._import(database)

    def _export(self, writer: str, lost: int, *, closing: bool) -> None:
        now = time.time()
        if self._segments:
            self._segments.write(closing=closing)
            closed_at = now if closing else None
            write_record(
                self._directory,
                GatewayRecord(id=writer, started_at=self._started_at, alive_at=now, closed_at=closed_at, lost=lost),
            )
        self._commit()

    def _import(self, database: Database) -> None:
        """Take others' files for a moment; a long history is taken over many calls, beside the requests."""
        files, self._incoming = self._incoming, iter(())  # after a failure all that is missing is listed again
        deadline = time.monotonic() + _IMPORT_S
        for file in files:
            import_files(database, [file])
            if time.monotonic() > deadline:
                self._incoming = files
                return


def files_in(directory: Path, imported: set[str], own: str = "") -> Iterable[tuple[str, bytes]]:
    """Return the path within the directory, and the content, of files that are not imported yet; rows are read once."""
    for path in sorted(directory.glob("*/*.json*")):
        name = f"{path.parent.name}/{path.name}"
        if (
            path.suffix not in {".json", ".jsonl"}
            or name in imported
            or path.name.startswith(f"{own}-" if own else "\0")
            or path.stem == own
        ):
            continue
        with contextlib.suppress(OSError):
            yield name, path.read_bytes()
            if path.suffix == ".jsonl":
                imported.add(name)


def import_files(database: Database, files: Iterable[tuple[str, bytes]]) -> None:
    """Put files into a database; those that are damaged are skipped.

    Raises:
        DatabaseError: It cannot be written.
    """
    for name, content in files:
        kind = name.partition("/")[0]
        with contextlib.suppress(ValueError):
            if kind == REQUESTS:
                _import_rows(database, content)
            elif kind == REPLICAS:
                _put(database, "replicas", _REPLICA.decode(content))
            elif kind == GATEWAYS:
                _put(database, "writers", _GATEWAY.decode(content))


def imported_files(database: Database, names: Iterable[str]) -> set[str]:
    """Return which of these files of requests a database has: it gets the rows of a file all at once."""
    sql = "SELECT 1 FROM requests WHERE writer = :writer AND number = :number"
    found = set()
    for name in names:
        if (match := _NAME.fullmatch(name)) and database.read(sql, writer=match[1], number=int(match[2])):
            found.add(name)
    return found


class _Line(msgspec.Struct):
    writer: str
    number: int


# Made before there are threads: see service/batch/store.py.
_REPLICA, _GATEWAY = msgspec.json.Decoder(ReplicaRecord), msgspec.json.Decoder(GatewayRecord)
_HEAD, _ROW = msgspec.json.Decoder(_Line), msgspec.json.Decoder(UsageRecord)


def _import_rows(database: Database, content: bytes) -> None:
    by_writer: dict[str, dict[int, UsageRecord]] = {}
    for line in content.splitlines():
        head = _HEAD.decode(line)
        by_writer.setdefault(head.writer, {})[head.number] = _ROW.decode(line)
    for writer, records in by_writer.items():
        known = database.read(
            "SELECT number FROM requests WHERE writer = :writer AND number BETWEEN :first AND :last",
            writer=writer,
            first=min(records),
            last=max(records),
        )
        for (number,) in known:
            records.pop(number, None)
        from_file: Statement = (_FROM_FILE, [{"id": writer}])
        database.write(*(insertion(writer, records) if records else ()), from_file)


def _put(database: Database, table: str, record: GatewayRecord | ReplicaRecord) -> None:
    names = [field.name for field in fields(record)]
    columns, values = ", ".join(names), ", ".join(f":{name}" for name in names)
    changes = ", ".join(f"{name} = excluded.{name}" for name in names)
    row: Mapping[str, Any] = asdict(record)
    sql = f"INSERT INTO {table} ({columns}) VALUES ({values}) ON CONFLICT (id) DO UPDATE SET {changes}"  # noqa: S608
    statement: Statement = (sql, [row])
    database.write(statement)
