"""Ends a process group, every member of it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

_POLL_S = 0.01


def kill_group(pgid: int, timeout_s: float) -> None:
    """Kill a process group and wait until no member runs, at most `timeout_s`. A zombie does not run any more."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            os.killpg(pgid, signal.SIGKILL)
        except ProcessLookupError:
            return
        if not _runs(pgid):
            return
        time.sleep(_POLL_S)


def reap_group(pgid: int) -> None:
    """Reap the zombies of a killed group whose leader was reaped: a container's first process gets its orphans."""
    with contextlib.suppress(ChildProcessError):  # there are none, or another process gets them
        while os.waitpid(-pgid, os.WNOHANG)[0]:
            pass


def _runs(pgid: int) -> bool:
    """Tell whether a process group has a member that is no zombie."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) == pgid and state not in {"Z", "X"}:
                return True
    return False
