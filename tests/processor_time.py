"""Processor time as a multiple of a Python that does nothing: machines differ by more than limits in seconds bear."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def ended(process: subprocess.Popen[Any]) -> float:
    """Wait for a program's end; return the processor time (in seconds) that it took."""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime


def bare_s(env: Mapping[str, str] | None = None) -> float:
    """Return the processor time of a Python that does nothing: 0.02 s on a fast machine, the unit of these limits."""
    return ended(subprocess.Popen((sys.executable, "-c", "pass"), env=env))
