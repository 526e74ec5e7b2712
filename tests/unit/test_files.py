"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.errors import UsageError
from service.files import atomic_write, require_writable


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


def test_named_file_that_cannot_be_written_is_an_error_of_usage(tmp_path: Path) -> None:
    """Its directory is missing, or it is one; a new and an old file are fine."""
    (tmp_path / "old").touch()
    require_writable(tmp_path / "old")
    require_writable(tmp_path / "new")
    with pytest.raises(UsageError, match="cannot be written: No such directory"):
        require_writable(tmp_path / "no" / "new")
    with pytest.raises(UsageError, match="cannot be written: Is a directory"):
        require_writable(tmp_path)


def test_device_is_never_replaced(tmp_path: Path) -> None:
    """`-o /dev/stdout` of a command that replaces its file would, as root, make a file of it for the whole machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="Is no file but a device or a pipe"):
        atomic_write(pipe, b"data")
    assert pipe.is_fifo()
    assert [*tmp_path.iterdir()] == [pipe]
    for device in (pipe, Path("/dev/null"), Path("/dev/stdout"), Path("/dev/fd/1")):
        require_writable(device)
        with pytest.raises(UsageError, match=f"'{device}' cannot be written: Is no file but a device or a pipe"):
            require_writable(device, is_replaced=True)


@pytest.mark.parametrize("name", ["old", "new"])
def test_named_file_that_this_user_may_not_write_is_an_error_of_usage(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For an old file it is asked of the file, for a new one of its directory."""
    (tmp_path / "old").touch()
    refused = tmp_path / "old" if name == "old" else tmp_path
    monkeypatch.setattr(os, "access", lambda path, _mode: path != refused)  # root may write everywhere
    with pytest.raises(UsageError, match="cannot be written: Permission denied"):
        require_writable(tmp_path / name)
