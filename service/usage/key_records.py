"""The records of API clients' keys, beside those of the environment, and the database that has them.

A client has one record, and each change of it is a further version; who changes an outdated version is refused. So two
commands at once never undo each other, and a key that was made is never lost. No key is kept, here or elsewhere.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from service.errors import ServiceError
from service.usage.database import Database, DuplicateRowError, database_opener, local_file
from service.usage.limits import NO_LIMITS, KeyLimits, utc_text

_CURRENT = """SELECT name, version, record FROM api_keys a
    WHERE version = (SELECT max(version) FROM api_keys b WHERE b.name = a.name)"""
_NEXT = f"{_CURRENT} AND name > :after ORDER BY name LIMIT :limit"
_INSERT = "INSERT INTO api_keys (name, version, at, record) VALUES (:name, :version, :at, :record)"


class KeyConflictError(ServiceError):
    """Another process changed the same client's keys at the same time."""

    is_transient = True


@dataclass(frozen=True)
class StoredKey:
    """One key of a client; times are seconds since 1970.

    Attributes:
        ends_at: When it stops being valid, after a rotation; None: never.
    """

    digest: str
    created_at: float
    ends_at: float | None = None

    def is_valid(self, now: float) -> bool:
        """Tell whether it is valid at a time."""
        return self.ends_at is None or now < self.ends_at


@dataclass(frozen=True)
class KeyRecord:
    """The keys and limits of one client.

    Attributes:
        version: Counts its changes, from 1.
        revoked_at: When all its keys were revoked.
        created_at: When the client was made: a name that was revoked and made again is another client.
    """

    name: str
    version: int = 0
    keys: tuple[StoredKey, ...] = ()
    limits: KeyLimits = field(default_factory=KeyLimits)
    revoked_at: float | None = None
    created_at: float | None = None

    @property
    def identity(self) -> str:
        """What tells a client from others that had its name; a rotation keeps it."""
        first = min((key.created_at for key in self.keys), default=0.0) if self.created_at is None else self.created_at
        return f"{first * 1000:.0f}"

    def to_json(self) -> str:
        """Return all but name and version."""
        limits = self.limits.model_dump(exclude_defaults=True)
        times = {"revoked_at": self.revoked_at, "created_at": self.created_at}
        return json.dumps({"keys": [asdict(key) for key in self.keys], "limits": limits, **times})

    @classmethod
    def from_json(cls, name: str, version: int, text: str) -> KeyRecord:
        """Return the record that `to_json` described.

        Raises:
            ServiceError: It has what this release does not know.
        """
        try:
            found = json.loads(text)
            keys = tuple(StoredKey(**key) for key in found["keys"])
            return cls(name, version, keys, _limits_of(found["limits"]), found["revoked_at"], found.get("created_at"))
        except (ValueError, KeyError, TypeError) as error:
            raise ServiceError(
                f"The stored record of the key '{name}' cannot be read.",
                hint="Install the release of vllm-service that wrote it, or a newer one.",
            ) from error

    def to_fields(self, now: float) -> dict[str, Any]:
        """Return what may be shown: no digest."""
        valid = [key for key in self.keys if key.is_valid(now)]
        return {
            "name": self.name,
            "state": self._state(now),
            "keys": [
                {"created": utc_text(key.created_at), "ends": None if key.ends_at is None else utc_text(key.ends_at)}
                for key in valid
            ],
            "limits": self.limits.model_dump(exclude_defaults=True),
            "revoked": None if self.revoked_at is None else utc_text(self.revoked_at),
        }

    def _state(self, now: float) -> str:
        if self.revoked_at is not None:
            return "revoked"
        expires_at = self.limits.expires_at
        return "expired" if expires_at is not None and expires_at <= now else "valid"


def _limits_of(fields: Mapping[str, object]) -> KeyLimits:
    return KeyLimits.model_validate(fields) if fields else NO_LIMITS


class KeyStore(Protocol):
    """Where the records are. All calls block."""

    def changes(self) -> int:
        """Return a number that each change makes larger; cheaper than `load`.

        Raises:
            ServiceError: They cannot be read.
        """

    def load(self) -> dict[str, KeyRecord]:
        """Return the newest record of each client.

        Raises:
            ServiceError: They cannot be read.
        """

    def page(self, after: str, limit: int) -> list[KeyRecord]:
        """Return the newest records of the next clients after a name, in the order of names.

        Raises:
            ServiceError: They cannot be read.
        """

    def save(self, record: KeyRecord) -> None:
        """Keep a record.

        Raises:
            KeyConflictError: Its version is there already.
            ServiceError: It cannot be written.
        """


class DatabaseKeys:
    """The records in a database, for any thread.

    Args:
        connect: Opens the database.
        file: SQLite's; while there is none, there are no keys, and reading them makes none.
    """

    def __init__(self, connect: Callable[[], Database], file: Path | None = None) -> None:
        self._connect, self._file = connect, file
        self._lock = threading.Lock()
        self._database: Database | None = None

    def changes(self) -> int:
        """Return the number of all changes so far."""
        if self._file and not self._file.exists():
            return 0
        found: int = self._use(lambda database: database.read("SELECT count(*) FROM api_keys"))[0][0]
        return found

    def load(self) -> dict[str, KeyRecord]:
        """Return the newest record of each client."""
        if self._file and not self._file.exists():
            return {}
        rows = self._use(lambda database: database.read(_CURRENT))
        return {name: KeyRecord.from_json(name, version, text) for name, version, text in rows}

    def page(self, after: str, limit: int) -> list[KeyRecord]:
        """Return the newest records of the next clients after a name."""
        if self._file and not self._file.exists():
            return []
        rows = self._use(lambda database: database.read(_NEXT, after=after, limit=limit))
        return [KeyRecord.from_json(name, version, text) for name, version, text in rows]

    def save(self, record: KeyRecord) -> None:
        """Keep a record."""
        row = {"name": record.name, "version": record.version, "at": time.time(), "record": record.to_json()}
        try:
            self._use(lambda database: database.write((_INSERT, [row])))
        except DuplicateRowError:
            raise KeyConflictError(f"The keys of '{record.name}' were changed at the same time.") from None

    def close(self) -> None:
        """Close the database; the next call opens it again."""
        with self._lock:
            if self._database:
                self._database.close()
            self._database = None

    def _use(self, work: Callable[[Database], Any]) -> Any:
        with self._lock:
            if self._database is None:
                self._database = self._connect()
            try:
                return work(self._database)
            except DuplicateRowError:
                raise
            except ServiceError:  # its file or its server may be another one next time
                self._database.close()
                self._database = None
                raise


def database_keys(url: str | None) -> DatabaseKeys:
    """Return the keys in PostgreSQL, or, without its URL, in this machine's file.

    Raises:
        UsageError: The URL is none of PostgreSQL's.
    """
    return DatabaseKeys(database_opener(url), None if url else local_file())
