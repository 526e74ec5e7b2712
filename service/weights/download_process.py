"""Downloads one repository in a process of its own.

The hub's client downloads on threads that no interrupt ends, and leaves sockets and open files on a volume behind. A
child process can be killed, and takes them along before a snapshot is taken. Run as `python -m` with this module: the
repository comes as JSON on standard input, which stays open for as long as the parent lives; log records, progress and
the result go to standard output as JSON lines; what the client itself prints goes to standard error. The child inherits
the environment, and with it HF_TOKEN.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from service.errors import ServiceError, WeightsError
from service.weights.download import download
from service.weights.files import RepositorySpec
from service.weights.progress import Progress

STALL_S = 300.0  # without one byte: what the client waits for will not come


def download_in_child(repository: RepositorySpec, on_progress: Callable[[Progress], None] = lambda _: None) -> Path:
    """Do as `download` does, in a child that is killed when this process is interrupted or dies.

    Raises:
        GatedModelError: The hub wants a token of an account that accepted the model's licence.
        DiskSpaceError: The cache has too little room for what is missing, or became full.
        WeightsError: Anything else that prevents a complete download.
    """
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-P", "-m", "service.weights.download_process"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, start_new_session=True, **pipes) as child:
        try:
            return _follow(child, repository, on_progress)
        except BaseException:
            child.send_signal(signal.SIGKILL)
            raise


def _follow(child: subprocess.Popen[str], repository: RepositorySpec, on_progress: Callable[[Progress], None]) -> Path:
    assert child.stdin is not None  # noqa: S101 - download_in_child opens pipes
    assert child.stdout is not None  # noqa: S101 - download_in_child opens pipes
    with contextlib.suppress(BrokenPipeError):  # it died at once, which is reported below
        child.stdin.write(json.dumps(asdict(repository)) + "\n")
        child.stdin.flush()
    for line in child.stdout:
        event = json.loads(line)
        if "logger" in event:
            logging.getLogger(event["logger"]).log(event["level"], "%s", event["message"])
        elif "progress" in event:
            on_progress(Progress(**event["progress"]))
        elif "error" in event:
            raise ServiceError.from_fields(event)
        else:
            return Path(event["path"])
    raise WeightsError(
        f"The download of {repository.hub_id} ended with code {child.wait()} and no reason; its output is above.",
        hint="Start again: finished files are kept.",
    )


def main() -> None:
    """Download what standard input names."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # systemd signals every process of a service; the parent ends this one
    fields = json.loads(sys.stdin.readline())
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    fields |= {name: tuple(fields[name]) for name in ("ignore_patterns", "keep_patterns")}
    repository = RepositorySpec(**fields)
    parent = _ParentPipe(repository)
    service_log = logging.getLogger("service")
    service_log.addHandler(parent)
    service_log.setLevel(logging.INFO)
    try:
        path = download(repository, parent.report)
    except ServiceError as error:
        parent.send(error.to_fields())
    else:
        parent.send({"path": str(path)})
    os._exit(0)  # without waiting for the client's threads


def _exit_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


class _ParentPipe(logging.Handler):
    """Sends log records, progress and the result to the parent, from several threads."""

    def __init__(self, repository: RepositorySpec) -> None:
        super().__init__(logging.INFO)
        self._repository = repository
        self._sending = threading.Lock()
        self._last: Progress | None = None
        self._since = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        """Send a log record."""
        self.send({"logger": record.name, "level": record.levelno, "message": record.getMessage()})

    def report(self, progress: Progress) -> None:
        """Send progress when it has changed; end the process when it has not changed for too long."""
        now = time.monotonic()
        if progress != self._last:
            self._last, self._since = progress, now
            self.send({"progress": asdict(progress)})
        elif now - self._since > STALL_S:
            stalled = WeightsError(
                f"{self._repository.label} stalled: not a byte came within {STALL_S:.0f} s.",
                hint="Check the connection and start again: finished files are kept.",
            )
            self.send(stalled.to_fields())
            os._exit(0)

    def send(self, event: Mapping[str, Any]) -> None:
        """Write a line."""
        with self._sending:
            sys.stdout.write(json.dumps(event) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
