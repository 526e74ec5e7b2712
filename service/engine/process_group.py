"""The end of a process group, whole."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

KILL_WAIT_S = 5.0
_POLL_S = 0.01


def kill_group(pgid: int) -> None:
    """Kill a process group and wait, boundedly, until no member runs. Zombies that nobody reaps run no more."""
    deadline = time.monotonic() + KILL_WAIT_S
    while time.monotonic() < deadline:
        try:
            os.killpg(pgid, signal.SIGKILL)
        except ProcessLookupError:
            return
        if not _runs(pgid):
            return
        time.sleep(_POLL_S)


def _runs(pgid: int) -> bool:
    """Tell whether a process group has a member that is no zombie."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) == pgid and state not in {"Z", "X"}:
                return True
    return False
