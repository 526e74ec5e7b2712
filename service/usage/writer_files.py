"""What processes write of usage on a volume that many containers share.

It has no locks, and of two writers of a file the last one wins, so each file has one writer. A process keeps a record
of itself, which it replaces, and files of rows, each written once and whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from service.files import atomic_write
from service.usage.records import UsageRecord

DIRECTORY = "usage"  # within the volume
INTERVAL_S = 30.0  # what a killed container loses at most
REQUESTS, GATEWAYS, REPLICAS = "requests", "gateways", "replicas"  # directories within it
_MOST_SMALL, _FULL_BYTES = 100, 8 * 1024 * 1024  # of small files, before they become one


@dataclass(frozen=True, kw_only=True)
class GatewayRecord:
    """A process that writes requests; times are seconds since 1970.

    Attributes:
        closed_at: When it had written everything; None: it runs, or was killed.
        lost: Requests that it could not write.
    """

    id: str
    started_at: float
    alive_at: float
    closed_at: float | None = None
    lost: int = 0


@dataclass(frozen=True, kw_only=True)
class ReplicaRecord:
    """A replica, for what it costs; times are seconds since 1970.

    Attributes:
        dollars_per_hour: None: it has no price.
        ready_at: When its wake ended; None: it has not, or it failed.
        ended_at: None: it runs, or was killed soon after `alive_at`.
    """

    id: str
    model: str
    gpu: str
    dollars_per_hour: float | None = None
    started_at: float
    ready_at: float | None = None
    alive_at: float
    ended_at: float | None = None


class Segments:
    """The files of one writer's rows: a new one each time, and of many small ones one.

    Args:
        directory: That of all usage on the volume.
        writer: Id of this process.
    """

    def __init__(self, directory: Path, writer: str) -> None:
        self._directory, self._writer = directory, writer
        self._first, self._waiting = 1, list[UsageRecord]()
        self._small: list[tuple[int, int]] = []  # first and last row of the small files
        self._bytes = 0

    def add(self, records: Iterable[UsageRecord]) -> None:
        """Take rows for the next file."""
        self._waiting.extend(records)

    def write(self, *, closing: bool = False) -> None:
        """Write the rows that wait into a file of their own, and make one of many small files, or at the end of all.

        Raises:
            OSError: They could not be written, and wait on.
        """
        if count := len(self._waiting):
            last = self._first + count - 1
            lines = [
                json.dumps({"writer": self._writer, "number": number, **record.as_row()})
                for number, record in enumerate(self._waiting[:count], self._first)
            ]
            content = "\n".join(lines).encode() + b"\n"
            atomic_write(self._file(self._first, last), content)
            del self._waiting[:count]
            self._small.append((self._first, last))
            self._first, self._bytes = last + 1, self._bytes + len(content)
        if len(self._small) >= (2 if closing else _MOST_SMALL) or self._bytes >= _FULL_BYTES:
            self._merge()

    def _merge(self) -> None:
        files = [self._file(first, last) for first, last in self._small]
        if len(files) > 1:
            content = b"".join(file.read_bytes() for file in files)
            atomic_write(self._file(self._small[0][0], self._small[-1][1]), content)
            for file in files:  # a reader that still sees one skips its rows, which it has already
                file.unlink(missing_ok=True)
        self._small, self._bytes = [], 0

    def _file(self, first: int, last: int) -> Path:
        return self._directory / REQUESTS / f"{self._writer}-{first:012}-{last:012}.jsonl"


def write_record(directory: Path, record: GatewayRecord | ReplicaRecord) -> None:
    """Replace the record of a process.

    Raises:
        OSError: It could not be written.
    """
    kind = GATEWAYS if isinstance(record, GatewayRecord) else REPLICAS
    atomic_write(directory / kind / f"{record.id}.json", json.dumps(asdict(record)).encode() + b"\n")
