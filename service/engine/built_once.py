"""Builds an environment with uv in the user's cache directory: once, by one process, while others wait and reuse it."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from service.engine.installer import Finished, OnProgress, run_uv
from service.errors import EnvironmentBuildError
from service.files import user_directory
from service.hardware import check_disk_space

_log = logging.getLogger(__name__)
_MARK = ".complete"


def cache_home() -> Path:
    """Return where this service keeps what can be built again."""
    return user_directory("XDG_CACHE_HOME", "~/.cache") / "vllm-service"


def is_built(root: Path) -> bool:
    """Tell whether a finished environment is here."""
    return (root / _MARK).exists()


def build_once(root: Path, name: str, detail: str, needed_gb: float, build: Callable[[], None]) -> None:
    """Build the environment `root` unless it is here.

    Args:
        root: Its directory, which names all that decides what is installed.
        name: What messages call it, such as `the engine's environment`.
        detail: What is said of it when it is built.
        needed_gb: Room that it takes while it is built.
        build: Builds it; what an interrupted attempt left is removed before.

    Raises:
        DiskSpaceError: It would not fit.
        EnvironmentBuildError: Its directory cannot be made, or `build` failed.
    """
    if is_built(root):
        return
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentBuildError(
            f"The directory of {name}, {root.parent}, cannot be made: {error.strerror}.",
            hint="Set XDG_CACHE_HOME to a directory that you may write to.",
        ) from error
    with _only_one(root.with_suffix(".lock"), name):
        if not is_built(root):
            title = name[0].upper() + name[1:]
            check_disk_space(root, needed_gb, title, "set XDG_CACHE_HOME to a larger disk")
            _log.info("Building %s (%s), once: %s", name, detail, root)
            began = time.monotonic()
            if root.exists():  # an attempt that was interrupted; uv's cache has what that downloaded
                shutil.rmtree(root)
            build()
            (root / _MARK).touch()
            _log.info("%s is built: %.0f s", title, time.monotonic() - began)


def make_venv(root: Path, name: str) -> None:
    """Make an empty environment with the Python that runs this process.

    Raises:
        EnvironmentBuildError: uv failed.
    """
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    check_uv("venv", run_uv("venv", "--quiet", "--python", str(base), str(root)), name)


def install(root: Path, on_progress: OnProgress, *arguments: str) -> Finished:
    """Install packages into an environment, compiled; return how uv ended."""
    command = ("pip", "install", "--python", str(root / "bin" / "python"), "--compile-bytecode", *arguments)
    return run_uv(*command, on_progress=on_progress, directory=root / "lib")


def check_uv(command: str, finished: Finished, name: str) -> None:
    """Insist that a command of uv went well.

    Raises:
        EnvironmentBuildError: It failed; the lines of its error are logged.
    """
    if finished.code != 0:
        _log.error("%s", "\n".join(finished.error_lines))
        raise EnvironmentBuildError(
            f"uv {command} failed with code {finished.code} while it built {name}; its output is above.",
            hint="Check the connection and the room on the disk, then run the same command again: "
            "it keeps what was downloaded.",
        )


@contextmanager
def _only_one(file: Path, name: str) -> Iterator[None]:
    """Let one process build at a time; the others wait and reuse the result. The kernel frees a dead holder's lock."""
    lock = FileLock(file, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.info("Another process is building %s; waiting for it.", name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
