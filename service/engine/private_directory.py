"""The directory of one engine's temporary files, which ends with the engine, or else with the next start.

vLLM's sockets between its processes lie in the directory for temporary files and outlive a kill. The engine holds a
lock on its directory, which the kernel releases with the last of its processes: one whose lock is free is left over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "vllm-service-"
_LOCK = "engine.lock"
_SOCKET_PATH = 107  # characters that the path of a socket may have
_NAMES = len(f"/{_PREFIX}") + 8 + len("/") + 36  # of a directory that mkdtemp makes, and of vLLM's sockets


def create() -> tuple[Path, int]:
    """Remove what engines left that were killed together with their parents, and return a new directory and its lock.

    The lock is a descriptor: whoever inherits it holds the lock.

    Raises:
        OSError: The directory cannot be made.
    """
    parent = _parent()
    _remove_leftovers(parent)
    while True:
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        try:
            lock = os.open(directory / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if directory.exists():
            return directory, lock
        os.close(lock)  # another start took it for left over, before it was locked


def remove(directory: Path) -> None:
    """Remove the directory with what the engine has left in it."""
    shutil.rmtree(directory, ignore_errors=True)


def _parent() -> Path:
    """Return the directory for temporary files, or a shorter one where paths of sockets would become too long."""
    usual = tempfile.gettempdir()
    return Path(usual if len(usual) + _NAMES <= _SOCKET_PATH else "/tmp")  # noqa: S108 - mkdtemp makes one of our own


def _remove_leftovers(parent: Path) -> None:
    for directory in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # no engine's directory, another user's, or of an engine that runs
            lock = os.open(directory / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if directory.stat().st_uid == os.getuid():
                    remove(directory)
            finally:
                os.close(lock)
