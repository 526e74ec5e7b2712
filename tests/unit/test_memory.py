"""How much memory may be used, on machines and in containers that the test makes up."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service import memory
from service.errors import MemoryTooSmallError

GB = 10**9
UNLIMITED = 9223372036854771712  # what version 1 says where there is no limit


class Machine:
    """A /proc and mounts of control groups, in a directory.

    Args:
        root: The directory.
        available_gb: What the kernel can give.
    """

    def __init__(self, root: Path, available_gb: float = 20) -> None:
        self.proc, self._root = root / "proc", root
        (self.proc / "self").mkdir(parents=True)
        kib = int(available_gb * GB / 1024)
        (self.proc / "meminfo").write_text(f"MemTotal: 24000000 kB\nMemFree: 1 kB\nMemAvailable:   {kib} kB\n")
        self.own: list[str] = []
        self.mounts = ["31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755"]
        self._write()

    def mount(self, version: int, path: str = "/", root: str = "/", options: str = "") -> Path:
        """Mount the groups of a version, of which this process is in `path`; return the mount's directory."""
        point = self._root / f"cgroup{version}{options}"
        point.mkdir()
        kind = "cgroup2" if version == 2 else "cgroup"
        self.own.append(f"0::{path}" if version == 2 else f"4:{options or 'memory'}:{path}")
        self.mounts.append(f"32 31 0:29 {root} {point} rw,nosuid shared:9 - {kind} cgroup rw,{options or 'memory'}")
        self._write()
        return point

    def _write(self) -> None:
        (self.proc / "self/cgroup").write_text("9:name=systemd:/\n" + "".join(f"{line}\n" for line in self.own))
        (self.proc / "self/mountinfo").write_text("".join(f"{line}\n" for line in self.mounts))


def limit(group: Path, version: int, limit_gb: float | str, used_gb: float = 0, cached_gb: float = 0) -> None:
    """Write the files of a control group."""
    group.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    most = limit_gb if isinstance(limit_gb, str) else str(int(limit_gb * GB))
    (group / names[0]).write_text(f"{most}\n")
    (group / names[1]).write_text(f"{int(used_gb * GB)}\n")
    cached = int(cached_gb * GB)
    other = "inactive_file 0\ntotal_inactive_file" if version == 1 else "inactive_anon 5\ninactive_file"
    (group / "memory.stat").write_text(f"cache 77\n{other} {cached}\nactive_file 5\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Return a machine with 20 GB available."""
    made = Machine(tmp_path)
    monkeypatch.setattr(memory, "_PROC", made.proc)
    return made


def available_gb() -> float:
    """Return what may be used, in 10^9 bytes."""
    return round(memory.available_bytes() / GB, 1)


def test_available_without_control_groups_is_what_the_kernel_gives(machine: Machine) -> None:
    """MemAvailable counts the page cache as free."""
    assert available_gb() == 20


@pytest.mark.parametrize("version", [1, 2])
def test_available_in_a_container_is_limit_less_usage_without_droppable_cache(machine: Machine, version: int) -> None:
    """Docker's view: the group is the root of what is mounted."""
    limit(machine.mount(version), version, 8, used_gb=5, cached_gb=3)

    assert available_gb() == 6


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("outer_gb", "inner_gb"), [(8, 16), (16, 8)])
def test_available_is_the_least_of_all_groups_around(
    machine: Machine, version: int, outer_gb: float, inner_gb: float
) -> None:
    """A pod around a container, a slice around a unit."""
    point = machine.mount(version, "/pod/container")
    limit(point / "pod", version, outer_gb, used_gb=1)
    limit(point / "pod/container", version, inner_gb, used_gb=1)

    assert available_gb() == 7


@pytest.mark.parametrize("version", [1, 2])
def test_available_in_a_container_that_sees_its_path_on_the_host(machine: Machine, version: int) -> None:
    """Without a namespace of its own the path is the host's, and the mount shows only that part of the tree."""
    point = machine.mount(version, "/docker/4711/inner", root="/docker/4711")
    limit(point, version, 8)
    limit(point / "inner", version, 4)

    assert available_gb() == 4


@pytest.mark.parametrize("path", ["/elsewhere/4711", "/../../neighbour"])
@pytest.mark.parametrize("root", ["/", "/docker/4711"])
def test_available_with_a_path_that_is_not_mounted_takes_what_is(machine: Machine, path: str, root: str) -> None:
    """The path is the host's, and the mount is the container's."""
    limit(machine.mount(2, path, root=root), 2, 8)

    assert available_gb() == 8


@pytest.mark.parametrize(("version", "text"), [(2, "max"), (1, str(UNLIMITED))])
def test_available_with_no_limit_is_what_the_kernel_gives(machine: Machine, version: int, text: str) -> None:
    """`max` and the largest number are no limit."""
    limit(machine.mount(version), version, text, used_gb=3)

    assert available_gb() == 20


def test_available_where_usage_is_over_the_limit_is_nothing(machine: Machine) -> None:
    """The limit was lowered, or the kernel is about to kill."""
    limit(machine.mount(2), 2, 8, used_gb=9)

    assert available_gb() == 0


def test_available_with_both_versions_mounted_looks_at_both(machine: Machine) -> None:
    """A hybrid system has the memory controller in one of them, and other controllers beside."""
    limit(machine.mount(1), 1, 6)
    machine.mount(2, "/user.slice")
    limit(machine.mount(1, options="cpu"), 1, 1)  # no memory controller: files of that name there mean nothing

    assert available_gb() == 6


def test_available_on_this_machine_is_something() -> None:
    """The real files are read."""
    assert 0 < memory.available_bytes() < 10**15


@pytest.mark.parametrize(("limit_gb", "growth"), [(2, 1 << 30), (6, int(1.5 * GB)), (100, 5 * GB)])
def test_growth_of_an_engine_is_a_quarter_of_what_is_free_within_bounds(
    machine: Machine, limit_gb: float, growth: int
) -> None:
    """A small container leaves the least; the machine, which has 20 GB free, bounds a large one."""
    limit(machine.mount(2), 2, limit_gb)

    assert memory.growth_bytes() == growth
    assert memory.core_growth_bytes() == max(1 << 30, int(min(limit_gb, 20) * GB) // 2)


@pytest.mark.parametrize(("version", "file"), [(1, "memory.oom_control"), (2, "memory.events")])
def test_oom_kills_are_those_of_the_control_group(machine: Machine, version: int, file: str) -> None:
    """The machine's counter has those of its other containers too."""
    (machine.proc / "vmstat").write_text("oom_kill 9\n")
    (machine.mount(version) / file).write_text("oom 3\nunder_oom 0\noom_kill 2\n")

    assert memory.oom_kills() == 2


def test_oom_kills_outside_control_groups_are_the_machines(machine: Machine) -> None:
    """And none where nothing counts them."""
    machine.mount(2)
    assert memory.oom_kills() == 0
    (machine.proc / "vmstat").write_text("pgfault 7\noom_kill 9\n")
    assert memory.oom_kills() == 9


@pytest.mark.parametrize("weights_gb", [None, 0.0, 19.9])
def test_memory_that_is_enough_or_unknown_is_accepted(machine: Machine, weights_gb: float | None) -> None:
    """An entry without a figure is not checked."""
    memory.check_memory(weights_gb, "mine")


def test_memory_that_is_too_little_is_refused_with_a_way_out(machine: Machine) -> None:
    """What is needed, what is free, of how much, and where it fits."""
    words = r"'mine' are 236\.4 GB and 20\.0 GB .* free: this machine has 24\.6 GB\..*vllm-service deploy mine"
    with pytest.raises(MemoryTooSmallError, match=words):
        memory.check_memory(236.4, "mine")


def test_memory_of_a_container_is_refused_with_its_limit(machine: Machine) -> None:
    """The sentence names the group whose limit is in the way."""
    group = machine.mount(2)
    limit(group, 2, 8, used_gb=1)

    with pytest.raises(
        MemoryTooSmallError, match=rf"16\.1 GB and 7\.0 GB .*control group {group} is limited to 8\.0 GB"
    ):
        memory.check_memory(16.1, "qwen3-8b")


def test_memory_that_own_engines_hold_counts_as_usable(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle engine is stopped for the next one; the memory of its children counts, that of others does not."""
    monkeypatch.setattr(memory, "_PROC", Path("/proc"))
    child = "x = b'x' * 200_000_000; print('ready', flush=True); input()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    before = memory._held_by_children()
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        held = memory._held_by_children() - before
        process.communicate("")
    assert 200e6 < held < 300e6
    assert os.getpid() > 1

    monkeypatch.setattr(memory, "_PROC", machine.proc)
    monkeypatch.setattr(memory, "_held_by_children", lambda: 2 * GB)
    memory.check_memory(21.5, "mine")
    with pytest.raises(MemoryTooSmallError):
        memory.check_memory(22.5, "mine")


def test_models_of_a_list_are_compared_with_one_reading(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reading looks at every process; a list of 16 models took 16 of them, 85 ms of the gateway's time."""
    readings: list[Machine] = []

    def held_by_children() -> int:
        readings.append(machine)
        return 0

    monkeypatch.setattr(memory, "_held_by_children", held_by_children)
    for moment, expected in ((1000.0, 1), (1000.0 + memory._READING_S, 2)):
        monkeypatch.setattr(time, "monotonic", lambda moment=moment: moment)
        assert all(memory.shortage(50 * GB) for _ in range(16))
        assert len(readings) == expected
