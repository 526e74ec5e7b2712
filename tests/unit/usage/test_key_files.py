"""Keys on a volume: what lasts, and what is undone."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import ServiceError
from service.usage.key_files import FileKeys
from service.usage.key_records import KeyConflictError, KeyRecord
from service.usage.keys import Keys


def test_change_that_is_committed_is_read_by_the_next_process(tmp_path: Path) -> None:
    """Each change is committed before it is answered."""
    commits: list[int] = []
    keys = Keys(FileKeys(tmp_path / "keys", lambda: commits.append(1)))
    assert keys.records() == []
    keys.new("alice@example.com", {})
    record = keys.limit("alice@example.com", {"concurrency": 2})

    assert len(commits) == 2
    assert FileKeys(tmp_path / "keys", lambda: None).load() == {record.name: record}


def test_change_that_cannot_be_committed_is_undone(tmp_path: Path) -> None:
    """A restart would forget it: a key that was revoked would be valid again."""
    works = [True]

    def commit() -> None:
        if not works[-1]:
            raise RuntimeError("Modal is away")

    store = FileKeys(tmp_path, commit)
    keys = Keys(store)
    record, _ = keys.new("alice", {})
    works.append(False)
    with pytest.raises(ServiceError, match="Modal is away"):
        keys.revoke("alice")
    with pytest.raises(ServiceError, match="Modal is away"):
        keys.new("bob", {})

    assert store.load() == {"alice": record}


def test_outdated_change_and_damaged_file_are_told(tmp_path: Path) -> None:
    """Neither is taken for a client without keys."""
    store = FileKeys(tmp_path, lambda: None)
    store.save(KeyRecord("alice", 1))
    for version in (1, 3):
        with pytest.raises(KeyConflictError):
            store.save(KeyRecord("alice", version))
    (tmp_path / "bob.json").write_text("{")
    with pytest.raises(ServiceError, match="cannot be used"):
        store.load()
