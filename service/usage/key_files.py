"""Keys on a volume: a file for each client. One process writes it, the gateway's only container."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

from service.errors import ServiceError
from service.files import atomic_write
from service.usage.key_records import KeyConflictError, KeyRecord


class FileKeys:
    """The records in the files of a directory, for any thread of one process.

    Args:
        directory: Where they are; made with the first key.
        commit: Makes what was written last; blocks.
    """

    def __init__(self, directory: Path, commit: Callable[[], object]) -> None:
        self._directory, self._commit = directory, commit
        self._lock = threading.Lock()
        self._changes = 0

    def changes(self) -> int:
        """Return the number of changes that this process made; no other one makes any."""
        return self._changes

    def load(self) -> dict[str, KeyRecord]:
        """Return the newest record of each client."""
        return {record.name: record for record in self._records(lambda files: files)}

    def page(self, after: str, limit: int) -> list[KeyRecord]:
        """Return the newest records of the next clients after a name."""
        return self._records(lambda files: [file for file in files if file.stem > after][:limit])

    def _records(self, choose: Callable[[list[Path]], list[Path]]) -> list[KeyRecord]:
        """Return the records of those files that are chosen out of all, in the order of names."""
        with self._lock:
            try:
                files = sorted(self._directory.glob("[!.]*.json"), key=lambda file: file.stem)
                return [self._read(file) for file in choose(files)]
            except OSError as error:
                raise self._error(error) from error

    def save(self, record: KeyRecord) -> None:
        """Keep a record."""
        file = self._directory / f"{record.name}.json"
        text = json.dumps({"version": record.version, "record": record.to_json()})
        with self._lock:
            try:
                before = file.read_bytes() if file.exists() else None
                if record.version != (self._read(file).version if before else 0) + 1:
                    raise KeyConflictError(f"The keys of '{record.name}' were changed at the same time.")
                atomic_write(file, text.encode())
                self._commit_or_restore(file, before)
                self._changes += 1
            except OSError as error:
                raise self._error(error) from error

    def _commit_or_restore(self, file: Path, before: bytes | None) -> None:
        """Make a change last; one that does not is undone, since a restart would forget it."""
        try:
            self._commit()
        except Exception as error:
            if before is None:
                file.unlink()
            else:
                atomic_write(file, before)
            raise self._error(error) from error

    def _read(self, file: Path) -> KeyRecord:
        try:
            found = json.loads(file.read_bytes())
            return KeyRecord.from_json(file.stem, found["version"], found["record"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> ServiceError:
        why = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        return ServiceError(f"The keys in {self._directory} cannot be used: {why}.", hint="Try again in a moment.")
