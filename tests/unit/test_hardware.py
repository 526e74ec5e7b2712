"""What this machine has, asked of a machine that the test makes up."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from service import hardware
from service.errors import DiskSpaceError, GpuCountError, MemoryTooSmallError, UnsupportedPlatformError

IDS = ("GPU-aaaa1111-0000", "GPU-bbbb2222-0000")
Usage = namedtuple("Usage", "total used free")


def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, code: int = 0) -> None:
    """Put an nvidia-smi on PATH that lists so many GPUs; it knows `-L` only."""
    lines = "".join(f"echo 'GPU {i}: NVIDIA H200 (UUID: {IDS[i]})'\n" for i in range(gpus))
    tool = tmp_path / "driver" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\n[ "$*" = "-L" ] || exit 64\n{lines}exit {code}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent))


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13), (3, 14)])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "AMD64"])
def test_platform_with_a_build_is_accepted(
    monkeypatch: pytest.MonkeyPatch, machine: str, version: tuple[int, int]
) -> None:
    """Linux on two kinds of processor, four versions of Python."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(sys, "version_info", (*version, 0))

    hardware.check_platform()


@pytest.mark.parametrize(
    ("system", "machine", "named"),
    [
        ("darwin", "arm64", "arm64"),
        ("win32", "AMD64", "amd64"),
        ("linux", "riscv64", "riscv64"),
        ("linux", "i686", "i686"),
    ],
)
def test_platform_without_a_build_is_refused_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, named: str
) -> None:
    """The sentence has the machine, what is supported, and Modal, which needs no engine here."""
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(UnsupportedPlatformError, match=f"on {named}; it runs on Linux on x86_64 and aarch64.*Modal"):
        hardware.check_platform()


@pytest.mark.parametrize("version", [(3, 10), (3, 15), (2, 7), (4, 0)])
def test_python_outside_the_range_is_refused(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int]) -> None:
    """The sentence has the version, the range and the command."""
    monkeypatch.setattr(sys, "version_info", (*version, 0))

    with pytest.raises(UnsupportedPlatformError, match=f"Python {version[0]}.{version[1]} .*3.11 to 3.14.*make"):
        hardware.check_platform()


def test_gpus_without_a_driver_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No nvidia-smi on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))

    assert hardware.visible_gpus() == 0


def test_gpus_with_a_broken_driver_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A driver that fails lists nothing that could be used."""
    driver(tmp_path, monkeypatch, 2, code=9)

    assert hardware.visible_gpus() == 0


@pytest.mark.parametrize(
    ("chosen", "visible"),
    [
        (None, 2), ("0", 1), ("1", 1), ("0,1", 2), ("1,0", 2), (" 0 , 1 ", 2), ("", 0), ("-1", 0), ("0,-1,1", 1),
        ("-1,0", 0), ("0,,1", 1), (IDS[0], 1), (",".join(IDS), 2), ("GPU-aaaa", 1), ("NoDevFiles", 0),
        ("7", 0), ("0,7", 1), ("7,0", 0), ("GPU-cccc", 0), ("2", 0),
    ],
)  # fmt: skip
def test_gpus_visible_are_those_that_cuda_would_show(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chosen: str | None, visible: int
) -> None:
    """CUDA reads the variable up to the first entry that names no GPU, by index or by the beginning of its UUID."""
    driver(tmp_path, monkeypatch, 2)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)

    assert hardware.visible_gpus() == visible


def driver_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Put an nvidia-smi on PATH whose driver has this version."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n[ \"$1\" = --query-gpu=driver_version ] && echo '{version}' && echo '{version}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize("version", ["580.95.05", "581.1", "600", "unreadable"])
def test_driver_that_runs_the_engines_cuda_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """580 or newer; what cannot be read is left to CUDA to judge."""
    driver_version(tmp_path, monkeypatch, version)
    hardware.check_driver()


def test_driver_too_old_is_refused_with_both_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before gigabytes are installed: update it, or use the processor."""
    driver_version(tmp_path, monkeypatch, "570.133.20")
    with pytest.raises(
        UnsupportedPlatformError, match=r"570\.133\.20 is older than 580.*CUDA_VISIBLE_DEVICES= make serve"
    ):
        hardware.check_driver()


@pytest.mark.parametrize("n_gpu", [1, 2])
def test_gpu_count_that_is_visible_is_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, n_gpu: int) -> None:
    """Up to all of them."""
    driver(tmp_path, monkeypatch, 2)

    hardware.check_gpu_count(n_gpu, "mine")


def test_gpu_count_over_what_is_visible_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Model, wanted, there, and what to set on Modal."""
    driver(tmp_path, monkeypatch, 2)

    with pytest.raises(GpuCountError, match=r"'mine' is to run on n_gpu=4 GPUs and 2 are visible.*SERVICE_N_GPU=4"):
        hardware.check_gpu_count(4, "mine")


def test_room_that_is_enough_is_accepted(tmp_path: Path) -> None:
    """A directory that is not there yet is looked up by its parents."""
    hardware.check_room(tmp_path / "not" / "yet", 1e-9, "It", "do that")


def test_room_that_is_too_little_names_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs it, how much, where, how much there is, and the remedy."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12, 2 * 10**9))

    with pytest.raises(DiskSpaceError, match=rf"It needs 5\.0 GB and {tmp_path} has 2\.0 GB free.*or do that\."):
        hardware.check_room(tmp_path / "not" / "yet", 5, "It", "do that")


@pytest.mark.parametrize("weights_gb", [None, 0.0, 15.9])
def test_memory_that_is_enough_or_unknown_is_accepted(
    monkeypatch: pytest.MonkeyPatch, weights_gb: float | None
) -> None:
    """An entry without a figure is not judged."""
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 4 * 10**6, "SC_PAGE_SIZE": 4000}[name])

    hardware.check_memory(weights_gb, "mine")


def test_memory_that_is_too_little_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 236 GB are downloaded."""
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 4 * 10**6, "SC_PAGE_SIZE": 4000}[name])

    with pytest.raises(
        MemoryTooSmallError, match=r"'mine' are 236 GB .* 16 GB of memory.*SERVICE_MODEL=mine modal deploy"
    ):
        hardware.check_memory(236.4, "mine")


@pytest.mark.parametrize(("limit", "expected"), [("max", 2048), ("1000", 1000), ("9223372036854771712", 2048)])
def test_available_memory_is_the_containers_where_that_is_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int
) -> None:
    """`max` and the largest number are no limit."""
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:       2 kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    monkeypatch.setattr(hardware, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(hardware, "_LIMITS", (tmp_path / "memory.max", tmp_path / "nothing"))

    assert hardware.available_bytes() == expected
