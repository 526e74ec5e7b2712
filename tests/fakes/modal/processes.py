"""Which processes belong to a container, and how they are frozen, thawed and ended.

A process belongs to it by its session or, since an engine may start a session of its own, by its network namespace;
where there is none, by what its environment names: the path of the container's arguments.
"""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


def network_namespace(pid: int) -> str | None:
    """Return the namespace's name where the process has one of its own, else None."""
    own = _link(PROC / "self" / "ns" / "net")
    theirs = _link(PROC / str(pid) / "ns" / "net")
    return theirs if theirs != own else None


@dataclass(frozen=True)
class Marks:
    """How a container's processes are told from others."""

    session: int
    namespace: str | None
    environment: bytes


def members(marks: Marks) -> list[int]:
    """List the live processes of a container (zombies left out)."""
    pids = (int(entry.name) for entry in PROC.iterdir() if entry.name.isdecimal())
    return [pid for pid in pids if _belongs(pid, marks) and not _is_zombie(pid)]


def send(pids: list[int], number: signal.Signals) -> None:
    """Send the signal to every process that is still there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue  # it ended between the listing and the signal


async def stragglers(marks: Marks, grace_s: float) -> list[int]:
    """List the live processes of a container that do not end by themselves within the grace."""
    deadline = asyncio.get_running_loop().time() + grace_s
    while (pids := members(marks)) and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 - /proc tells nobody
        await asyncio.sleep(0.01)
    return pids


async def end(marks: Marks) -> None:
    """SIGKILL every process of the container until none is left."""
    while pids := members(marks):
        send(pids, signal.SIGKILL)
        await asyncio.sleep(0.01)


def open_files(pids: list[int], directory: Path) -> list[Path]:
    """List files and working directories under `directory` that the processes hold open."""
    held: list[Path] = []
    for pid in pids:
        try:
            links = [PROC / str(pid) / "cwd", *(PROC / str(pid) / "fd").iterdir()]
        except (FileNotFoundError, PermissionError):
            continue
        targets = [Path(target) for link in links if (target := _link(link))]
        held += [target for target in targets if target.is_relative_to(directory)]
    return held


def _belongs(pid: int, marks: Marks) -> bool:
    try:
        if os.getsid(pid) == marks.session:
            return True
        if marks.namespace is not None:
            return _link(PROC / str(pid) / "ns" / "net") == marks.namespace
        return marks.environment in (PROC / str(pid) / "environ").read_bytes()
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return False


def _is_zombie(pid: int) -> bool:
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _link(path: Path) -> str | None:
    try:
        return str(path.readlink())
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return None
