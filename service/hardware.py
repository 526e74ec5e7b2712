"""What this machine or container has: platform, GPUs, room, ports. The only module that asks.

Never touches torch: under a CPU snapshot that would freeze "no GPU" into the process.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from service.errors import DiskSpaceError, GpuCountError, MemoryTooSmallError, UnsupportedPlatformError

MIN_PYTHON, MAX_PYTHON = (3, 11), (3, 14)
MIN_DRIVER = 580
_MEMINFO = Path("/proc/meminfo")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def check_platform() -> None:
    """Refuse what vLLM has no build for.

    Raises:
        UnsupportedPlatformError: Another system than Linux, another processor, or another Python.
    """
    machine = platform.machine().lower()
    if sys.platform != "linux" or machine not in {"x86_64", "amd64", "aarch64", "arm64"}:
        raise UnsupportedPlatformError(
            f"vLLM has no build for {platform.system()} on {machine}; it runs on Linux on x86_64 and aarch64. "
            "Use such a machine or a Linux virtual machine, or deploy to Modal, which needs no engine here."
        )
    version = sys.version_info[:2]
    if not MIN_PYTHON <= version <= MAX_PYTHON:
        raise UnsupportedPlatformError(
            f"Python {version[0]}.{version[1]} is outside what vLLM is built for, 3.11 to 3.14. "
            "Remove .venv and run make again with PYTHON=python3.12, say."
        )


def visible_gpus() -> int:
    """Return how many NVIDIA GPUs this process may use: what the driver lists, less what CUDA_VISIBLE_DEVICES hides."""
    lines = nvidia_smi("-L")
    present = sum(line.startswith("GPU ") for line in lines)
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return present
    ids = [part.strip() for part in chosen.split(",")]
    uuids = [uuid for line in lines for uuid in re.findall(r"\(UUID: (\S+)\)", line)]
    bad = (i for i, part in enumerate(ids) if not _names_gpu(part, present, uuids))
    return min(present, next(bad, len(ids)))  # CUDA reads up to the first entry that names none


def nvidia_smi(*arguments: str) -> list[str]:
    """Return what the driver's tool prints, line by line; nothing where there is no driver."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _names_gpu(part: str, present: int, uuids: list[str]) -> bool:
    """Tell whether an entry of CUDA_VISIBLE_DEVICES is an index or the beginning of a UUID that the driver lists."""
    if part.isdecimal():
        return int(part) < present
    return part.startswith(("GPU-", "MIG-")) and any(uuid.startswith(part) for uuid in uuids)


def check_driver() -> None:
    """Refuse an NVIDIA driver that is too old for the engine's CUDA, before the engine is built.

    Raises:
        UnsupportedPlatformError: It is older than 580, which CUDA 13 needs.
    """
    version = next(iter(nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")), "").strip()
    major = version.partition(".")[0]
    if major.isdecimal() and int(major) < MIN_DRIVER:
        raise UnsupportedPlatformError(
            f"The NVIDIA driver {version} is older than {MIN_DRIVER}, which the engine's CUDA 13 needs. Update it, or "
            "use the processor alone: CUDA_VISIBLE_DEVICES= make serve."
        )


def check_gpu_count(n_gpu: int, model: str) -> None:
    """Refuse to spread a model over more GPUs than there are.

    Raises:
        GpuCountError: Fewer than `n_gpu` are visible.
    """
    visible = visible_gpus()
    if n_gpu > visible:
        raise GpuCountError(
            f"'{model}' is to run on n_gpu={n_gpu} GPUs and {visible} are visible here. On Modal deploy with "
            f"SERVICE_N_GPU={n_gpu} or use a variant with gpu='<GPU>:{n_gpu}'; otherwise lower n_gpu."
        )


def check_room(directory: Path, needed_gb: float, purpose: str, remedy: str) -> None:
    """Refuse to begin what will not fit.

    Raises:
        DiskSpaceError: The file system of `directory` has less than `needed_gb` (10^9 bytes) free.
    """
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free_gb = shutil.disk_usage(existing).free / 1e9
    if free_gb < needed_gb:
        raise DiskSpaceError(
            f"{purpose} needs {needed_gb:.1f} GB and {existing} has {free_gb:.1f} GB free. Free some, or {remedy}."
        )


def check_memory(weights_gb: float | None, model: str) -> None:
    """Refuse a model whose weights alone are more than this machine's memory, before it is downloaded.

    Raises:
        MemoryTooSmallError: `weights_gb` (10^9 bytes) is more than there is; None is not checked.
    """
    memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    if weights_gb and weights_gb > memory_gb:
        raise MemoryTooSmallError(
            f"The weights of '{model}' are {weights_gb:.0f} GB and this machine has {memory_gb:.0f} GB of memory. "
            "Serve a smaller one here (vllm-service models), or deploy it: SERVICE_MODEL="
            f"{model} modal deploy -m service.server."
        )


def available_bytes() -> int:
    """Return how much memory may be used: what the kernel can give, or a container's limit where that is lower."""
    limits = [int(text) for file in _LIMITS if file.is_file() and (text := file.read_text().strip()).isdigit()]
    available = re.search(r"^MemAvailable:\s+(\d+)", _MEMINFO.read_text(), re.M)
    return min([*limits, int(available[1]) * 1024]) if available else 0
