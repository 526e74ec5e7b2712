"""How much memory may be used: of the machine, and of each control group (container, systemd unit) around us."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

from service.errors import MemoryTooSmallError

_PROC = Path("/proc")
_READING_S = 0.25
_LEAST_GROWTH, _MOST_GROWTH = 1 << 30, 8 << 30  # vLLM's cache of images alone may have 4 GiB
# Files of a control group's directory: its limit, its usage, and the name in memory.stat of the page cache that the
# kernel drops first; version 1 counts the groups below only under this name.
_VERSIONS = {
    "cgroup2": ("memory.max", "memory.current", "inactive_file"),
    "cgroup": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
_MOUNT = re.compile(r"^\S+ \S+ \S+ (?P<root>\S+) (?P<point>\S+) .* - (?P<type>cgroup2?) \S+ (?P<options>\S+)$", re.M)


@dataclass(frozen=True, order=True)
class Room:
    """Memory that may be used, and what bounds it, as the end of a sentence.

    Attributes:
        usable_bytes: With what this process's own engines hold: they can be stopped for another.
    """

    free_bytes: int
    bound: str
    usable_bytes: int = 0

    def __str__(self) -> str:
        """Return a clause such as `7.0 GB of memory are free: this machine has 8.0 GB`."""
        return f"{self.free_bytes / 1e9:.1f} GB of memory are free: {self.bound}"


def available_bytes() -> int:
    """Return how much memory may be used now: what the kernel can give, or less where a control group allows less."""
    return _room().free_bytes


def shortage(needed_bytes: float) -> Room | None:
    """Return what there is where that is less than `needed_bytes`; None: it is enough."""
    reading = _reading(_PROC, time.monotonic() // _READING_S)
    room = reading.room
    if needed_bytes <= room.free_bytes:
        return None
    usable = room.free_bytes + reading.held_by_children
    return None if needed_bytes <= usable else replace(room, usable_bytes=usable)


def check_memory(weights_gb: float | None, model: str) -> None:
    """Refuse a model whose weights alone are more than the memory that may be used, before they are downloaded.

    Raises:
        MemoryTooSmallError: `weights_gb` (10^9 bytes) is more than there is; None is not checked.
    """
    if weights_gb and (room := shortage(weights_gb * 1e9)):
        raise MemoryTooSmallError(
            f"The weights of '{model}' are {weights_gb:.1f} GB and {room}.",
            hint="Serve a smaller model here (vllm-service models), free memory or raise the limit, or deploy it: "
            f"vllm-service deploy {model}.",
        )


def growth_bytes() -> int:
    """Return how much more memory an engine's API server may take than at its start: requests, images and their cache.

    The engine is not loaded yet, so what is free now is for its weights too.
    """
    return min(_MOST_GROWTH, max(_LEAST_GROWTH, available_bytes() // 4))


def core_growth_bytes() -> int:
    """Return how much more memory an engine's core may take, for requests and for what it keeps of images."""
    return max(_LEAST_GROWTH, available_bytes() // 2)


def oom_kills() -> int:
    """Return how many processes the kernel has killed for lack of memory: of our control group, or of the machine."""
    for version, group, _ in _memory_groups():
        with contextlib.suppress(OSError):
            return _counter(group / ("memory.events" if version == "cgroup2" else "memory.oom_control"), "oom_kill")
    with contextlib.suppress(OSError):
        return _counter(_PROC / "vmstat", "oom_kill")
    return 0


class _Reading:
    """What there is at one moment."""

    @cached_property
    def room(self) -> Room:
        return _room()

    @cached_property
    def held_by_children(self) -> int:
        return _held_by_children()


@lru_cache(maxsize=1)
def _reading(_proc: Path, _moment: float) -> _Reading:
    """Return what all models of a list are compared with: one reading took 5 ms where 300 processes run."""
    return _Reading()


def _room() -> Room:
    meminfo = dict(re.findall(r"^(\w+):\s+(\d+) kB", (_PROC / "meminfo").read_text(), re.M))
    total, free = (int(meminfo.get(name, 0)) * 1024 for name in ("MemTotal", "MemAvailable"))
    return min([Room(free, f"this machine has {total / 1e9:.1f} GB"), *_rooms_in_groups()])


def _rooms_in_groups() -> Iterator[Room]:
    for version, group, root in _memory_groups():
        limit_file, usage_file, cache = _VERSIONS[version]
        for directory in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # a group without a limit has no such file, or "max" in it
                limit = int((directory / limit_file).read_text())
                used = int((directory / usage_file).read_text()) - _counter(directory / "memory.stat", cache)
                yield Room(max(0, limit - used), f"the control group {directory} is limited to {limit / 1e9:.1f} GB")
            if directory == root:
                break


def _memory_groups() -> Iterator[tuple[str, Path, Path]]:
    """Yield version, directory and mount point of each control group of this process that can limit memory."""
    with contextlib.suppress(OSError):
        own = re.findall(r"^\d+:([^:]*):(.*)$", (_PROC / "self/cgroup").read_text(), re.M)
        for mount in _MOUNT.finditer((_PROC / "self/mountinfo").read_text()):
            controller = "" if mount["type"] == "cgroup2" else "memory"
            if controller and controller not in mount["options"].split(","):
                continue
            for path in (path for controllers, path in own if controller in controllers.split(",")):
                # In a container the mount may show a part of the tree only, and the path may be one of the host's.
                inside = os.path.relpath(path, mount["root"])
                point = Path(mount["point"])
                group = point if inside.startswith("..") else point / inside
                yield mount["type"], next(place for place in (group, *group.parents) if place.is_dir()), point


def _counter(file: Path, name: str) -> int:
    found = re.search(rf"^{name} (\d+)$", file.read_text(), re.M)
    return int(found[1]) if found else 0


def _held_by_children() -> int:
    """Return the anonymous memory of all descendants of this process."""
    parents, held = {}, {}
    for process in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):  # it has ended meanwhile
            pid, fields = int(process.name), (process / "stat").read_text().rpartition(")")[2].split()
            resident, shared = (process / "statm").read_text().split()[1:3]
            parents[pid], held[pid] = int(fields[1]), int(resident) - int(shared)

    def is_ours(pid: int) -> bool:
        while pid := parents.get(pid, 0):
            if pid == os.getpid():
                return True
        return False

    return sum(pages for pid, pages in held.items() if is_ours(pid)) * os.sysconf("SC_PAGE_SIZE")
