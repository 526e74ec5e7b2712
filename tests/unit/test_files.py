"""Files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.files import atomic_write


def test_atomic_write_replaces_a_file_and_makes_its_directory(tmp_path: Path) -> None:
    """The last write counts, and nothing else is in the directory."""
    file = tmp_path / "new" / "record.json"
    atomic_write(file, b"one")
    atomic_write(file, b"two")

    assert file.read_bytes() == b"two"
    assert list(file.parent.iterdir()) == [file]


def test_atomic_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    """A directory cannot be replaced by a file; the part that was written is removed."""
    taken = tmp_path / "taken"
    taken.mkdir()

    with pytest.raises(OSError, match="taken"):
        atomic_write(taken, b"data")
    assert list(tmp_path.iterdir()) == [taken]
