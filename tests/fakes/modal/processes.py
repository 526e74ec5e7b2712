"""Finds, signals and kills the processes of a container.

A process belongs to a container by its session or, since an engine may start a session of its own, by its network
namespace. Without a namespace it belongs by the path of the container's arguments in its environment.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


def network_namespace(pid: int) -> str | None:
    """Return the name of a process's network namespace, or None where it is this process's own."""
    own = _link(PROC / "self" / "ns" / "net")
    theirs = _link(PROC / str(pid) / "ns" / "net")
    return theirs if theirs != own else None


@dataclass(frozen=True)
class Marks:
    """What identifies the processes of a container."""

    session: int
    namespace: str | None
    environment: bytes


def members(marks: Marks) -> list[int]:
    """List the live processes of a container (zombies left out)."""
    pids = (int(name) for name in os.listdir(PROC) if name.isdecimal())  # noqa: PTH208 - pathlib takes five times as long
    return [pid for pid in pids if _belongs(pid, marks) and not _is_zombie(pid)]


def send(pids: list[int], number: signal.Signals) -> None:
    """Send the signal to every process that is still there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue  # it ended between the listing and the signal


@contextmanager
def frozen(pids: list[int]) -> Iterator[None]:
    """Stop these processes within a context; those that are left go on then, or end if this process ends within it.

    One that is stopped cannot see the end of its parent, and would stay for good.
    """
    command = ["sh", "-c", 'read -r line || kill -KILL "$@"', "sh", *map(str, pids)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True) as watch:
        send(pids, signal.SIGSTOP)
        try:
            yield
        finally:
            send(pids, signal.SIGCONT)
            watch.communicate(b"\n")


async def stragglers(marks: Marks, grace_s: float) -> list[int]:
    """List the live processes of a container that do not end by themselves within the grace."""
    deadline = asyncio.get_running_loop().time() + grace_s
    while (pids := members(marks)) and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 - /proc sends no events
        await asyncio.sleep(0.01)
    return pids


async def end(marks: Marks) -> None:
    """Send SIGKILL to every process of the container until none is left."""
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
            return os.readlink(f"/proc/{pid}/ns/net") == marks.namespace  # noqa: PTH115 - the same
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
