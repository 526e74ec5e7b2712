"""Processes that download: forked from one that has imported the client, or commands of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Self

from service.weights.download import download
from service.weights.files import RepositorySpec

ROOT = Path(__file__).parents[2]
_IMPORTED = ["service.weights.download", "httpx2", "huggingface_hub._snapshot_download", "huggingface_hub.hf_api"]


class Downloads:
    """Forks processes that do what the child of `download_process` does, without its one second of imports."""

    def __init__(self) -> None:
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(_IMPORTED)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes that multiprocessing keeps: other tests count the children of theirs."""
        from multiprocessing.forkserver import _forkserver
        from multiprocessing.resource_tracker import _resource_tracker

        _forkserver._stop()  # type: ignore[attr-defined]
        _resource_tracker._stop()  # type: ignore[attr-defined]

    def start(self, repository: RepositorySpec) -> ForkServerProcess:
        """Start one with the cache and the hub of this process."""
        ours = {name: value for name, value in os.environ.items() if name.startswith("HF_")}
        process = self._context.Process(target=_download, args=(repository, ours))
        process.start()
        return process


def _download(repository: RepositorySpec, environ: dict[str, str]) -> None:
    os.environ.update(environ)
    download(repository)
    os._exit(0)  # as the child does: past the client's threads


def python(program: str, before: list[str] | None = None) -> subprocess.Popen[str]:
    """Start an interpreter with the cache and the hub of this process; it defines `spec`, `weights` and `show_logs()`.

    Args:
        program: The code that it runs.
        before: The beginning of the command, such as `unshare`.
    """
    known = f"""
import logging, sys
from service.weights import store as weights
from service.errors import ServiceError
from service.registry.models import ModelSpec
spec = ModelSpec(key="mine", hub_id="org/mine", revision="{"0123456789abcdef" * 2}01234567")
def show_logs(): logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [*(before or []), sys.executable, "-c", known + program]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, env=env, **pipes, text=True, start_new_session=True)  # type: ignore[call-overload,no-any-return]
