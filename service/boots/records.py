"""Boot records: one a boot, in a file of its own, since many replicas write into one directory.

Cheap to import (msgspec and the standard library): it is imported while a replica starts. Reading skips what is damaged
and never fails a listing.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from service.files import atomic_write, user_directory

DIRECTORY = "boots"  # within the state directory of a machine, or within Modal's volume
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: sorts as the numbers do, no two look alike
# A record, or what a killed writer left of one (`.part`: an older version of this did).
_KEPT = re.compile(rf"\.?([{_ALPHABET}]{{13}})\.json(\.[0-9a-f]+\.tmp|\.part)?")


@dataclass(frozen=True)
class Span:
    """One phase, in seconds since the boot was requested. Negative: before the snapshot, once for all its replicas."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class BootRecord:
    """One boot.

    Attributes:
        id: `new_id()`'s; the name of the file.
        at: Time zero, when the boot was requested; ISO 8601 with its offset, UTC.
        gpu: Such as `H100`, `2 x H200`, or `cpu`.
        strategy: `off`, `cpu` or `gpu`.
        restored: From a memory snapshot that an earlier replica took.
        versions: Of what decides how long a boot takes, such as `{"vllm": "0.32.0"}`.
        outcome: `ready`; `cold`: a restore failed, or its canary did not match, and a cold boot followed; `failed`.
        reason: Why it is not simply `ready`.
        seconds: From time zero to the outcome.
    """

    id: str
    at: str
    model: str
    revision: str | None = None
    gpu: str
    strategy: str
    restored: bool
    fast_boot: bool
    versions: Mapping[str, str]
    phases: tuple[Span, ...]
    bytes_read: int | None = None
    outcome: str
    reason: str | None = None
    seconds: float

    @property
    def when(self) -> datetime:
        """Time zero."""
        return datetime.fromisoformat(self.at)

    @property
    def snapshot_seconds(self) -> float:
        """How long the snapshot's part took, once for all replicas; where phases overlap, time counts once."""
        total, until = 0.0, -math.inf
        for start, end in sorted((span.start, min(span.end, 0.0)) for span in self.phases):
            total += max(0.0, end - max(start, until))
            until = max(until, end)
        return total

    def as_object(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        encoded = msgspec.json.encode(self, enc_hook=dict)  # the hook is for a mapping that is no dict
        found: dict[str, Any] = msgspec.json.decode(encoded)
        return found

    def to_line(self) -> str:
        """Return the record as one line of JSON, without the line's end."""
        return json.dumps(self.as_object())

    @classmethod
    def from_line(cls, line: str | bytes) -> BootRecord:
        """Return the record of a line. Fields of a newer version are ignored.

        Raises:
            ValueError: It is not JSON, or a field is missing or of another type.
        """
        try:
            record = _DECODER.decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ValueError(f"not a boot record: {error}") from error
        if record.when.utcoffset() is None:
            raise ValueError(f"at={record.at!r} has no offset from UTC")
        return record


_DECODER = msgspec.json.Decoder(BootRecord)  # made before there are threads: see service/batch/store.py


def new_id() -> str:
    """Return an id of 13 characters that sorts by the time it was made, to the millisecond, and is unique."""
    number = time.time_ns() // 1_000_000 << 20 | secrets.randbits(20)
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(60, -1, -5))


def local_directory() -> Path:
    """Return where the boots of this machine are kept."""
    return state_directory() / DIRECTORY


def state_directory() -> Path:
    """Return where this machine keeps the logs and records of the service."""
    return user_directory("XDG_STATE_HOME", "~/.local/state") / "vllm-service"


def keep(record: BootRecord, directory: Path, limit: int = 500) -> Path:
    """Write the record into a file of its own, whole or not at all, and return the file.

    The oldest files of records beyond the limit go first, by their ids; files of other names are left alone.

    Raises:
        OSError: The disk is full, or the directory is not ours. The caller suppresses it: a boot that worked must not
            fail for want of its record.
    """
    directory.mkdir(parents=True, exist_ok=True)
    kept = sorted((match[1], path) for path in directory.iterdir() if (match := _KEPT.fullmatch(path.name)))
    for _, path in kept[: max(0, len(kept) + 1 - limit)]:
        with contextlib.suppress(OSError):  # another replica was faster, or it is not ours to remove
            path.unlink()
    file = directory / f"{Path(record.id).name}.json"
    atomic_write(file, record.to_line().encode() + b"\n")
    return file


def load(directory: Path) -> list[BootRecord]:
    """Return the records of a directory, oldest first; none where there is no such directory."""
    lines = []
    for path in directory.glob("*.json"):
        with contextlib.suppress(OSError):  # removed meanwhile, or a directory
            lines.append(path.read_bytes())
    return parse(lines)


def parse(lines: Iterable[str | bytes]) -> list[BootRecord]:
    """Return the records of lines, oldest first, without lines that are damaged or no records."""
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(BootRecord.from_line(line))
    return by_time(found)


def by_time(records: Iterable[BootRecord]) -> list[BootRecord]:
    """Return the records, oldest first."""
    return sorted(records, key=lambda record: (record.when, record.id))
