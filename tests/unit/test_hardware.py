"""What this machine has, asked of a machine that the test makes up."""

from __future__ import annotations

import platform
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from service import hardware
from service.errors import DiskSpaceError, GpuCountError, GpuDriverError, UnsupportedPlatformError
from service.hardware import Hardware, NvidiaGpu

IDS = ("GPU-aaaa1111-0000", "GPU-bbbb2222-0000")
QUERY = "--query-gpu=name,memory.total,driver_version,uuid --format=csv,noheader,nounits"
H200 = NvidiaGpu("NVIDIA H200", 143771, "580.95.05", IDS[0])
Usage = namedtuple("Usage", "total used free")


def driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *rows: str, code: int = 0, parts: tuple[str, ...] = ()
) -> Path:
    """Put an nvidia-smi on PATH that lists these GPUs and MIG parts; return the file that has a line for each call."""
    tool = tmp_path / "driver" / "nvidia-smi"
    tool.parent.mkdir()
    calls = tool.with_name("calls")
    listed = "".join(f"echo '{row}'\n" for row in rows)
    migs = "".join(f"echo '  MIG 1g.12gb Device  0: (UUID: {part})'\n" for part in parts)
    tool.write_text(
        f'#!/bin/sh\necho "$*" >>{calls}\n'
        f'case "$*" in\n"{QUERY}")\n{listed};;\n-L)\n{migs};;\n*) exit 64;;\nesac\nexit {code}\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent))
    return calls


def gpus(*drivers: str, name: str = "NVIDIA H200") -> list[str]:
    """Return the rows of GPUs with these drivers."""
    return [f"{name}, 143771, {version}, {IDS[i % 2]}" for i, version in enumerate(drivers)]


def machine(*found: NvidiaGpu) -> Hardware:
    """Return a machine with these GPUs."""
    return Hardware(found, ("model name : x",))


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Give the machine empty directories for device nodes, for the driver's tool and for WSL's libraries."""
    made = SimpleNamespace(**{name: tmp_path / name for name in ("devices", "tools", "wsl")})
    for directory in vars(made).values():
        directory.mkdir()
    monkeypatch.setattr(hardware, "_DEVICES", made.devices)
    monkeypatch.setattr(hardware, "_TOOL_DIRECTORIES", (made.tools, made.wsl))
    monkeypatch.setattr(hardware, "_WSL", made.wsl)
    return made


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


def test_machine_without_libnuma_is_refused_with_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU build starts without it, and then fails with an attribute of torch that is not there."""
    hardware.check_cpu_libraries()
    monkeypatch.setattr(hardware, "_NUMA", "libnowhere.so.1")

    with pytest.raises(UnsupportedPlatformError, match=r"libnowhere\.so\.1, which this machine lacks.*libnuma1"):
        hardware.check_cpu_libraries()


def test_gpus_without_a_driver_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No nvidia-smi on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))

    assert hardware.probe().gpus == ()


def test_gpus_with_a_broken_driver_and_no_device_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The driver is installed on a machine without a GPU."""
    driver(tmp_path, monkeypatch, *gpus("580", "580"), code=9)

    assert hardware.probe().gpus == ()


@pytest.mark.parametrize("place", ["tools", "wsl"])
def test_gpus_are_listed_by_a_tool_that_is_not_on_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, places: SimpleNamespace, place: str
) -> None:
    """A service, cron and WSL have a short PATH."""
    driver(tmp_path, monkeypatch, *gpus("580"))
    shutil.move(tmp_path / "driver" / "nvidia-smi", getattr(places, place))

    assert len(hardware.probe().gpus) == 1


@pytest.mark.parametrize("device", ["nvidia0", "nvidia1", "dxg"])
@pytest.mark.parametrize(
    ("code", "found"),
    [(None, "nvidia-smi is neither on PATH nor in "), (9, "ended with code 9"), (0, "printed no GPU")],
)
def test_gpu_without_an_answer_of_its_driver_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    places: SimpleNamespace,
    *,
    device: str,
    code: int | None,
    found: str,
) -> None:
    """The processor would serve a hundred times slower, without a word; the error has the device and what was tried."""
    (places.devices / device).touch()
    (places.wsl / "libcuda.so.1").touch()
    if code is not None:
        driver(tmp_path, monkeypatch, code=code)
    else:
        monkeypatch.setenv("PATH", "/nowhere")

    with pytest.raises(GpuDriverError, match=f"(?:{device}|libcuda.so.1) shows .*{found}.*CUDA_VISIBLE_DEVICES= make"):
        hardware.probe()


def test_gpu_without_an_answer_is_left_alone_where_the_user_chose_the_processor(
    monkeypatch: pytest.MonkeyPatch, places: SimpleNamespace
) -> None:
    """An empty CUDA_VISIBLE_DEVICES is a wish."""
    (places.devices / "nvidia0").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    assert hardware.probe().gpus == ()


@pytest.mark.parametrize("device", ["nvidiactl", "nvidia-uvm", "dxg"])
def test_gpus_where_a_device_is_no_gpu_are_none(places: SimpleNamespace, device: str) -> None:
    """The driver's other nodes are in containers without a GPU too, and WSL's node stands for Intel's and AMD's too."""
    (places.devices / device).touch()

    assert hardware.probe().gpus == ()


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
    driver(tmp_path, monkeypatch, *gpus("580", "580"))
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)

    assert len(hardware.probe().gpus) == visible


def test_probe_runs_nvidia_smi_once_and_reads_every_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that any part of a boot asks of the GPUs comes from one call; what the driver does not know is None."""
    calls = driver(tmp_path, monkeypatch, *gpus("580.95.05"), "NVIDIA GB10, [N/A], 580.95.05, GPU-cccc3333-0000")
    found = hardware.probe()

    assert found.gpus == (H200, NvidiaGpu("NVIDIA GB10", None, "580.95.05", "GPU-cccc3333-0000"))
    assert calls.read_text().splitlines() == [QUERY]


@pytest.mark.parametrize(("chosen", "visible"), [("MIG-aaaa", 1), ("MIG-bbbb", 0)])
def test_probe_shows_a_part_of_a_gpu_that_the_driver_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str, visible: int
) -> None:
    """A part has a UUID of its own, which only the listing has."""
    driver(tmp_path, monkeypatch, *gpus("580"), parts=("MIG-aaaa1111",))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)

    assert len(hardware.probe().gpus) == visible


def test_fingerprint_of_a_processor_is_its_instruction_sets() -> None:
    """Inductor compiles for them."""
    assert machine().fingerprint("cpu") == machine(H200).fingerprint("cpu")
    assert machine().fingerprint("cpu").startswith("cpu ")
    assert machine().fingerprint("cpu") != hardware.probe().fingerprint("cpu")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([("NVIDIA H100 80GB HBM3", "580.95.05")] * 8, "NVIDIA H100 80GB HBM3, 580.95.05"),
        ([("NVIDIA L4", "580"), ("NVIDIA A10", "580")], "NVIDIA A10, 580; NVIDIA L4, 580"),
        ([], ""),
    ],
    ids=["eight", "mixed", "silent"],
)
def test_fingerprint_of_gpus_is_kind_and_driver(found: list[tuple[str, str]], expected: str) -> None:
    """How many there are is vLLM's own matter."""
    assert machine(*(NvidiaGpu(name, None, version, "") for name, version in found)).fingerprint("cuda") == expected


@pytest.mark.parametrize("version", ["580.95.05", "581.1", "600", "unreadable"])
def test_driver_that_runs_the_engines_cuda_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """580 or newer; what cannot be read is left to CUDA to judge."""
    driver(tmp_path, monkeypatch, *gpus(version, version))
    hardware.check_driver(hardware.probe())


def test_driver_too_old_is_refused_with_both_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before gigabytes are installed: update it, or use the processor."""
    driver(tmp_path, monkeypatch, *gpus("570.133.20"))
    with pytest.raises(
        UnsupportedPlatformError, match=r"570\.133\.20 is older than 580.*CUDA_VISIBLE_DEVICES= make serve"
    ):
        hardware.check_driver(hardware.probe())


@pytest.mark.parametrize("n_gpu", [1, 2])
def test_gpu_count_that_is_visible_is_accepted(n_gpu: int) -> None:
    """Up to all of them."""
    hardware.check_gpu_count(machine(H200, H200), n_gpu, "mine")


def test_gpu_count_over_what_is_visible_is_refused() -> None:
    """Model, wanted, there, and what to set on Modal."""
    with pytest.raises(GpuCountError, match=r"'mine' is to run on n_gpu=4 GPUs and 2 are visible.*SERVICE_N_GPU=4"):
        hardware.check_gpu_count(machine(H200, H200), 4, "mine")


def test_room_that_is_enough_is_accepted(tmp_path: Path) -> None:
    """A directory that is not there yet is looked up by its parents."""
    hardware.check_disk_space(tmp_path / "not" / "yet", 1e-9, "It", "do that")


def test_room_that_is_too_little_names_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs it, how much, where, how much there is, and the remedy."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12, 2 * 10**9))

    with pytest.raises(DiskSpaceError, match=rf"It needs 5\.0 GB and {tmp_path} has 2\.0 GB free.*or do that\."):
        hardware.check_disk_space(tmp_path / "not" / "yet", 5, "It", "do that")
