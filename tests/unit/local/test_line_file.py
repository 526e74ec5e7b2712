"""Files of lines that never take more than twice their size."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from service.local.line_file import LineFile, line_writer


def test_full_file_is_kept_once_and_begun_anew(tmp_path: Path) -> None:
    """The newest lines are always there, and the disk holds two files at most."""
    with contextlib.closing(LineFile(tmp_path / "a.log", full_bytes=40)) as lines:
        for number in range(100):
            lines.write(f"line {number:04}")

    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.log", "a.log.1"]
    kept = (tmp_path / "a.log.1").read_text().splitlines() + (tmp_path / "a.log").read_text().splitlines()
    assert kept == [f"line {number:04}" for number in range(92, 100)]


def test_file_that_cannot_be_written_drops_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request never fails for its line: no directory, a full disk, a file that cannot be renamed."""
    (tmp_path / "file").write_text("")
    with line_writer(tmp_path / "file" / "a.log") as write:
        write("dropped")
    with line_writer(Path("/dev/full")) as write:
        write("dropped")
    with contextlib.closing(LineFile(tmp_path / "a.log", full_bytes=5)) as lines:
        lines.write("first line")
        monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
        lines.write("dropped")
        lines.write("dropped")


def test_device_is_never_renamed(tmp_path: Path) -> None:
    """A benchmark that wrote more lines than a file holds to /dev/null replaced it, as root, by a regular file."""
    ours, terminal = os.openpty()
    link = tmp_path / "a.log"
    link.symlink_to(os.ttyname(terminal))
    with contextlib.closing(LineFile(link, full_bytes=5)) as lines:
        for number in range(3):
            lines.write(f"line {number}")
    assert link.is_symlink()
    assert os.read(ours, 100).split() == [b"line", b"0", b"line", b"1", b"line", b"2"]
    os.close(ours)
    os.close(terminal)
