"""Memory that runs out in a control group of its own: the kernel kills the process that is named to it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

_ROOT = Path("/sys/fs/cgroup")
_LIMITS = {"memory": "memory.limit_in_bytes", ".": "memory.max"}  # of version 1 and 2
_USED = {"memory": "memory.usage_in_bytes", ".": "memory.current"}
_NO_LIMIT = {"memory": "-1", ".": "max"}
_ROOM = 16 * 1024**2
_WITHIN_S = 15.0
_ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
_HOG = """
import pathlib, sys, time
status, held = pathlib.Path("/proc", sys.argv[1], "stat"), []
pathlib.Path("/proc/self/oom_score_adj").write_text("999")  # the kernel may strike again before it has the first one's
for _ in range(256):
    # What the killed process frees is for those that are left, however late its end is noticed.
    if not status.exists() or status.read_text().rpartition(")")[2].split()[0] in "ZX":
        break
    held.append(b"." * (4 << 20))
    time.sleep(0.02)
time.sleep(60)
"""


class MemoryGroup:
    """A control group, if this user may make one.

    Args:
        name: Of the group.
    """

    def __init__(self, name: str) -> None:
        self._version = next((version for version in _LIMITS if self._is_made(version, name)), None)
        self._path = _ROOT / (self._version or "") / name

    def _is_made(self, version: str, name: str) -> bool:
        with contextlib.suppress(OSError):
            (_ROOT / version / name).mkdir()
            if (_ROOT / version / name / _LIMITS[version]).exists():
                return True
            (_ROOT / version / name).rmdir()
        return False

    @property
    def prefix(self) -> list[str]:
        """A command that runs a command in the group."""
        return ["sh", "-c", _ENTER, str(self._path)] if self._version else []

    def kill_by_kernel(self, victim: psutil.Process) -> None:
        """Let the memory of the group run out, so that the kernel kills this process; without a group, kill it."""
        if self._version is None:
            victim.kill()
            return
        limit = self._path / _LIMITS[self._version]
        Path(f"/proc/{victim.pid}/oom_score_adj").write_text("1000")
        hog = subprocess.Popen([*self.prefix, sys.executable, "-c", _HOG, str(victim.pid)])
        try:
            used = int((self._path / _USED[self._version]).read_text())
            limit.write_text(str(used + _ROOM))
            deadline = time.monotonic() + _WITHIN_S
            while victim.is_running() and victim.status() != psutil.STATUS_ZOMBIE:
                if time.monotonic() > deadline:
                    raise AssertionError(f"the kernel killed nothing within {_WITHIN_S:g} s")
                time.sleep(0.02)
        except psutil.NoSuchProcess:
            pass
        finally:
            limit.write_text(_NO_LIMIT[self._version])  # first: without the hog the kernel would kill another one
            hog.kill()
            hog.wait()

    def remove(self) -> None:
        """Remove the group, once its processes have ended."""
        if self._version:
            deadline = time.monotonic() + _WITHIN_S
            while self._path.exists() and time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    os.rmdir(self._path)  # noqa: PTH106 - its files cannot be removed
                time.sleep(0.05)
