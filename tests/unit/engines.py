"""What the tests of engines and replicas share: scripts, waiting, and what is left of processes, files and threads."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from service.replica.plan import Plan

READY_S = 20.0  # what a busy machine may need; nothing here waits so long


def scripted(plan: Plan, *, script: dict[str, Any] | None = None, **changes: Any) -> Plan:
    """Return the plan with changes; `script` is the fake engine's."""
    env = {**plan.parent_env, "VLLM_CPU_FAKE_ENGINE": json.dumps(script or {})}
    return dataclasses.replace(plan, parent_env=env, **changes)


def group(pgid: int) -> list[int]:
    """Return the running members of a process group; a zombie runs no more."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == pgid and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except ProcessLookupError:
            continue
    return found


def eventually(true: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Poll until something holds."""
    deadline = time.monotonic() + timeout_s
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return true()


def open_files() -> int:
    """Count this process's open file descriptors."""
    return len(list(Path("/proc/self/fd").iterdir()))


def open_links() -> set[str]:
    """Return what this process has open, such as `pipe:[4711]`: other tests' threads may close theirs meanwhile."""
    links = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the directory that is being read, or closed since
            links.add(str(path.readlink()))
    return links
