"""The directories of engines: of those that run they stay, of those that ended they go."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.engine import private_directory


@pytest.fixture(autouse=True)
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the directory for temporary files of this test; its path is short enough for sockets."""
    with tempfile.TemporaryDirectory() as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)


def test_directory_of_a_killed_engine_is_removed_by_the_next_start(parent: Path) -> None:
    """Not before its last process has ended."""
    left, lock = private_directory.create()
    (left / "socket").touch()
    with subprocess.Popen(["sleep", "60"], pass_fds=[lock]) as engine:
        os.close(lock)
        second, other_lock = private_directory.create()
        assert (left / "socket").exists()
        engine.kill()
    third, third_lock = private_directory.create()

    assert set(parent.iterdir()) == {second, third}
    for descriptor in (other_lock, third_lock):
        os.close(descriptor)


def test_directory_that_is_no_engines_is_left_alone(parent: Path) -> None:
    """Somebody may have cloned this repository there."""
    (parent / "vllm-service-clone").mkdir()
    (parent / "vllm-service-file").touch()
    directory, lock = private_directory.create()
    os.close(lock)

    assert set(parent.iterdir()) == {directory, parent / "vllm-service-clone", parent / "vllm-service-file"}


def test_directory_that_another_start_removed_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was not locked yet when the other looked."""
    removed: list[int] = []
    flock = private_directory.fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(descriptor)
            private_directory.remove(Path(f"/proc/self/fd/{descriptor}").readlink().parent)
        flock(descriptor, operation)

    monkeypatch.setattr(private_directory.fcntl, "flock", late)
    directory, lock = private_directory.create()
    os.close(lock)

    assert removed
    assert directory.exists()


def test_directory_leaves_room_for_the_names_of_sockets(
    parent: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A socket's path has at most 107 characters; vLLM's names have 36."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    directory, lock = private_directory.create()
    os.close(lock)
    private_directory.remove(directory)

    assert len(f"{directory}/") + 36 <= 107
