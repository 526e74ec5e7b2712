"""What this machine or container has: GPUs, processor, memory, disk space, platform. The only module that asks for it.

Never touches torch: under a CPU snapshot that would freeze "no GPU" into the process.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from service.errors import DiskSpaceError, GpuCountError, MemoryTooSmallError, UnsupportedPlatformError

MIN_PYTHON, MAX_PYTHON = (3, 11), (3, 14)
MIN_DRIVER = 580
_CPUINFO, _MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_GPU_FIELDS = ("name", "memory.total", "driver_version", "uuid")


@dataclass(frozen=True)
class NvidiaGpu:
    """A GPU as the driver lists it. `memory_mib` is None where the driver does not say."""

    name: str
    memory_mib: int | None
    driver: str
    uuid: str


@dataclass(frozen=True)
class Hardware:
    """What was found at one moment. Under a CPU snapshot no GPU is visible, so there it is probed after the restore.

    Attributes:
        gpus: The NVIDIA GPUs that this process may use: what the driver lists, less what CUDA_VISIBLE_DEVICES hides.
        cpu: Names of the processors and their instruction sets, for which inductor compiles.
        memory_bytes: The machine's memory.
    """

    gpus: tuple[NvidiaGpu, ...]
    cpu: tuple[str, ...]
    memory_bytes: int

    def fingerprint(self, device: str) -> str:
        """Return what compiled code depends on: GPUs and driver, or the processor; "" when the driver lists no GPU."""
        if device == "cuda":
            return "; ".join(sorted({f"{gpu.name}, {gpu.driver}" for gpu in self.gpus}))
        return f"cpu {hashlib.sha256(json.dumps(self.cpu).encode()).hexdigest()[:12]}"


def probe() -> Hardware:
    """Look at this machine; runs nvidia-smi once."""
    described = re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*$", _CPUINFO.read_text(), re.M)
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Hardware(_visible_gpus(), tuple(sorted(set(described))), memory_bytes)


def _visible_gpus() -> tuple[NvidiaGpu, ...]:
    rows = _nvidia_smi(f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits")
    gpus = [_gpu(fields) for row in rows if len(fields := row.split(", ")) == len(_GPU_FIELDS)]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return tuple(gpus)
    visible: list[NvidiaGpu] = []
    for part in (part.strip() for part in chosen.split(",")):
        if (gpu := _named(part, gpus)) is None or len(visible) == len(gpus):
            break  # CUDA reads up to the first entry that names no GPU
        visible.append(gpu)
    return tuple(visible)


def _gpu(fields: list[str]) -> NvidiaGpu:
    name, memory, driver, uuid = (field.strip() for field in fields)
    return NvidiaGpu(name, int(memory) if memory.isdecimal() else None, driver, uuid)


def _named(part: str, gpus: list[NvidiaGpu]) -> NvidiaGpu | None:
    """Return the GPU that an entry of CUDA_VISIBLE_DEVICES names by its index or the beginning of a UUID."""
    if part.isdecimal():
        return gpus[int(part)] if int(part) < len(gpus) else None
    if part.startswith("MIG-"):  # a part of a GPU; only this listing has the UUIDs of parts
        parts = [uuid for line in _nvidia_smi("-L") for uuid in re.findall(r"\(UUID: (MIG-[^)\s]+)\)", line)]
        return gpus[0] if gpus and any(uuid.startswith(part) for uuid in parts) else None
    return next((gpu for gpu in gpus if part.startswith("GPU-") and gpu.uuid.startswith(part)), None)


def _nvidia_smi(*arguments: str) -> list[str]:
    """Return what the driver's tool prints, line by line; nothing where there is no driver."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def available_bytes() -> int:
    """Return how much memory may be used now: what the kernel can give, or a container's limit where that is lower."""
    limits = [int(text) for file in _LIMITS if file.is_file() and (text := file.read_text().strip()).isdigit()]
    available = re.search(r"^MemAvailable:\s+(\d+)", _MEMINFO.read_text(), re.M)
    return min([*limits, int(available[1]) * 1024]) if available else 0


def check_platform() -> None:
    """Refuse what vLLM has no build for.

    Raises:
        UnsupportedPlatformError: Another system than Linux, another processor, or another Python.
    """
    machine = platform.machine().lower()
    if sys.platform != "linux" or machine not in {"x86_64", "amd64", "aarch64", "arm64"}:
        raise UnsupportedPlatformError(
            f"vLLM has no build for {platform.system()} on {machine}; it runs on Linux on x86_64 and aarch64.",
            hint="Use such a machine or a Linux virtual machine, or deploy to Modal, which needs no engine here.",
        )
    version = sys.version_info[:2]
    if not MIN_PYTHON <= version <= MAX_PYTHON:
        raise UnsupportedPlatformError(
            f"Python {version[0]}.{version[1]} is outside what vLLM is built for, 3.11 to 3.14.",
            hint="Remove .venv and run make again with another Python, such as PYTHON=python3.12.",
        )


def check_driver(hardware: Hardware) -> None:
    """Refuse an NVIDIA driver that is too old for the engine's CUDA, before the engine is built.

    Raises:
        UnsupportedPlatformError: It is older than 580, which CUDA 13 needs.
    """
    version = hardware.gpus[0].driver if hardware.gpus else ""
    major = version.partition(".")[0]
    if major.isdecimal() and int(major) < MIN_DRIVER:
        raise UnsupportedPlatformError(
            f"The NVIDIA driver {version} is older than {MIN_DRIVER}, which the engine's CUDA 13 needs.",
            hint="Update the driver, or use the processor alone: CUDA_VISIBLE_DEVICES= make serve.",
        )


def check_gpu_count(hardware: Hardware, n_gpu: int, model: str) -> None:
    """Refuse to spread a model over more GPUs than there are.

    Raises:
        GpuCountError: Fewer than `n_gpu` are visible.
    """
    if n_gpu > len(hardware.gpus):
        raise GpuCountError(
            f"'{model}' is to run on n_gpu={n_gpu} GPUs and {len(hardware.gpus)} are visible here.",
            hint=f"On Modal deploy with SERVICE_N_GPU={n_gpu} or use a variant with gpu='<GPU>:{n_gpu}'; otherwise "
            "lower n_gpu.",
        )


def check_disk_space(directory: Path, needed_gb: float, purpose: str, remedy: str) -> None:
    """Refuse to begin what will not fit.

    Raises:
        DiskSpaceError: The file system of `directory` has less than `needed_gb` (10^9 bytes) free.
    """
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free_gb = shutil.disk_usage(existing).free / 1e9
    if free_gb < needed_gb:
        raise DiskSpaceError(
            f"{purpose} needs {needed_gb:.1f} GB and {existing} has {free_gb:.1f} GB free.",
            hint=f"Free disk space, or {remedy}.",
        )


def check_memory(hardware: Hardware, weights_gb: float | None, model: str) -> None:
    """Refuse a model whose weights alone are more than this machine's memory, before it is downloaded.

    Raises:
        MemoryTooSmallError: `weights_gb` (10^9 bytes) is more than there is; None is not checked.
    """
    memory_gb = hardware.memory_bytes / 1e9
    if weights_gb and weights_gb > memory_gb:
        raise MemoryTooSmallError(
            f"The weights of '{model}' are {weights_gb:.0f} GB and this machine has {memory_gb:.0f} GB of memory.",
            hint="Serve a smaller model here (vllm-service models), or deploy it: "
            f"SERVICE_MODEL={model} modal deploy -m service.server.",
        )
