"""What this machine or container has: GPUs, processor, disk space, platform. `memory` asks for its memory.

Never touches torch: under a CPU snapshot that would freeze "no GPU" into the process.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.errors import DiskSpaceError, GpuCountError, GpuDriverError, GpuMemoryError, UnsupportedPlatformError

MIN_PYTHON, MAX_PYTHON = (3, 11), (3, 14)
MIN_DRIVER = 580
_NUMA = "libnuma.so.1"
_CPUINFO = Path("/proc/cpuinfo")
_DEVICES, _WSL = Path("/dev"), Path("/usr/lib/wsl/lib")
# Where nvidia-smi lives: Debian and others, Kubernetes's device plugin, WSL, GPU Operator, NixOS.
_TOOL_DIRECTORIES = (
    *(Path("/usr/bin"), Path("/usr/local/bin"), Path("/usr/local/nvidia/bin"), _WSL, Path("/opt/nvidia/bin")),
    *(Path("/run/nvidia/driver/usr/bin"), Path("/run/current-system/sw/bin")),
)
_MAY_NAME_A_GPU = re.compile(r"\s*(?:\d|GPU-|MIG-)")
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
    """

    gpus: tuple[NvidiaGpu, ...]
    cpu: tuple[str, ...]

    def fingerprint(self, device: str) -> str:
        """Return what compiled code depends on: GPUs and driver, or the processor; "" when the driver lists no GPU."""
        if device == "cuda":
            return "; ".join(sorted({f"{gpu.name}, {gpu.driver}" for gpu in self.gpus}))
        return f"cpu {hashlib.sha256(json.dumps(self.cpu).encode()).hexdigest()[:12]}"


def probe() -> Hardware:
    """Look at this machine; runs nvidia-smi once.

    Raises:
        GpuDriverError: There is a GPU, and its driver does not answer.
    """
    described = re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*$", _CPUINFO.read_text(), re.M)
    return Hardware(_visible_gpus(), tuple(sorted(set(described))))


def _visible_gpus() -> tuple[NvidiaGpu, ...]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None and not _MAY_NAME_A_GPU.match(chosen):  # such as "" and "-1": the processor alone
        return ()
    gpus = _listed_gpus()
    if chosen is None:
        return tuple(gpus)
    visible: list[NvidiaGpu] = []
    for part in (part.strip() for part in chosen.split(",")):
        if (gpu := _named(part, gpus)) is None or len(visible) == len(gpus):
            break  # CUDA reads up to the first entry that names no GPU
        visible.append(gpu)
    return tuple(visible)


def _listed_gpus() -> list[NvidiaGpu]:
    """Return the GPUs that the driver lists.

    Raises:
        GpuDriverError: There is a GPU and none is listed: the engine must not use the processor without a word.
    """
    done = _nvidia_smi(f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits")
    rows = [row.split(", ") for row in done.lines]
    gpus = [_gpu(fields) for fields in rows if len(fields) == len(_GPU_FIELDS)]
    if not gpus and (device := next((node for node in _gpu_devices() if node.exists()), None)):
        raise GpuDriverError(
            f"{device} shows that this machine has a GPU, and its driver lists none: {done.failure}.",
            hint="Run nvidia-smi, and mend the driver or put it on PATH; or use the processor alone: "
            "CUDA_VISIBLE_DEVICES= make serve.",
        )
    return gpus


def _gpu_devices() -> Iterator[Path]:
    """Yield what is only there where a GPU is: device nodes of NVIDIA's driver, and on WSL the library of Windows's."""
    yield from sorted(_DEVICES.glob("nvidia[0-9]*"))
    if (_DEVICES / "dxg").exists():
        yield _WSL / "libcuda.so.1"


def _gpu(fields: list[str]) -> NvidiaGpu:
    name, memory, driver, uuid = (field.strip() for field in fields)
    return NvidiaGpu(name, int(memory) if memory.isdecimal() else None, driver, uuid)


def _named(part: str, gpus: list[NvidiaGpu]) -> NvidiaGpu | None:
    """Return the GPU that an entry of CUDA_VISIBLE_DEVICES names by its index or the beginning of a UUID."""
    if part.isdecimal():
        return gpus[int(part)] if int(part) < len(gpus) else None
    if part.startswith("MIG-"):  # a part of a GPU; only this listing has the UUIDs of parts
        parts = [uuid for line in _nvidia_smi("-L").lines for uuid in re.findall(r"\(UUID: (MIG-[^)\s]+)\)", line)]
        return gpus[0] if gpus and any(uuid.startswith(part) for uuid in parts) else None
    return next((gpu for gpu in gpus if part.startswith("GPU-") and gpu.uuid.startswith(part)), None)


@dataclass(frozen=True)
class _Answer:
    """What nvidia-smi printed, or why it printed nothing."""

    lines: Sequence[str] = ()
    failure: str = "nvidia-smi printed no GPU"


def _nvidia_smi(*arguments: str) -> _Answer:
    """Run the driver's tool, which is not on the PATH of a service or of WSL."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *map(str, _TOOL_DIRECTORIES)])
    if (tool := shutil.which("nvidia-smi", path=path)) is None:
        return _Answer(failure=f"nvidia-smi is neither on PATH nor in {', '.join(map(str, _TOOL_DIRECTORIES))}")
    try:
        done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return _Answer(failure=f"{tool} did not answer within 30 s")
    except OSError as error:
        return _Answer(failure=f"{tool} cannot be run, {error.strerror}")
    if done.returncode != 0:
        said = " ".join((done.stdout + done.stderr).split())
        return _Answer(failure=f"{tool} ended with code {done.returncode}, '{said}'")
    return _Answer(done.stdout.splitlines())


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


def check_cpu_libraries() -> None:
    """Refuse a machine without the library that vLLM's CPU build takes from the system, before the engine is built.

    Raises:
        UnsupportedPlatformError: libnuma is not installed.
    """
    try:
        ctypes.CDLL(_NUMA)
    except OSError as error:
        raise UnsupportedPlatformError(
            f"vLLM's CPU build needs {_NUMA}, which this machine lacks.",
            hint="Install it: apt-get install libnuma1 (Debian, Ubuntu), dnf install numactl-libs (Fedora, RHEL).",
        ) from error


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


def check_gpu_memory(hardware: Hardware, n_gpu: int, weights_gb: float | None, model: str) -> None:
    """Refuse a model whose weights alone are more than the memory of the GPUs that it is to run on.

    Raises:
        GpuMemoryError: `weights_gb` (10^9 bytes) is more than there is; None, and a GPU of unknown memory, are not
            checked.
    """
    largest = sorted((gpu.memory_mib or math.inf for gpu in hardware.gpus), reverse=True)[:n_gpu]
    memory_gb = sum(largest) * 2**20 / 1e9
    if weights_gb and weights_gb > memory_gb:
        raise GpuMemoryError(
            f"The weights of '{model}' are {weights_gb:.1f} GB, and {n_gpu} of this machine's GPUs have "
            f"{memory_gb:.1f} GB.",
            hint="Serve a smaller model here (vllm-service models), spread it over more GPUs (SERVICE_N_GPU), or "
            f"deploy it: vllm-service deploy {model}.",
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
