"""The process that `bounded_process` forks, from inside: it reads jobs, and does each in a fork with bounds.

What a job leaves behind goes with its fork. A job is a line of JSON and so is its answer. `CANCEL` during a job kills
it without an answer; the end of the connection, which is the end of the parent, ends the process and its job.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import select
import signal
import socket
import time
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

CANCEL = b"\n"
_PR_SET_PDEATHSIG = 1
_PIECE = 1 << 16


@dataclass(frozen=True)
class Bounds:
    """What one job may take.

    Attributes:
        cpu_s: Seconds of processor time, of all its threads.
        memory_bytes: Beyond what the process has before it.
        wall_s: Seconds; a job that waits for something takes no processor time.
    """

    cpu_s: float
    memory_bytes: int
    wall_s: float


class Work(Protocol):
    """What is done."""

    def prepare(self, job: dict[str, Any]) -> None:
        """Make ready what this job and later ones use; runs unbounded, so it must not look at what a client sent."""

    def do(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a job; runs in a fork with bounds."""


def serve(connection: socket.socket, parent: int, work: Work, bounds: Bounds) -> NoReturn:
    """Do jobs until the connection ends; call it in a fresh fork."""
    try:
        _detach(connection, parent)
        _do_jobs(connection, work, bounds)
    finally:
        os._exit(0)  # past whatever the parent would do at its own end


def _detach(connection: socket.socket, parent: int) -> None:
    """Let go of what belongs to the parent: its sockets, its signal handlers, and later its life."""
    _die_with(parent)
    kept = connection.fileno()
    os.closerange(3, kept)
    os.closerange(kept + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent drains, and ends this process
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    gc.disable()  # it would copy every page that it looks at
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(0)


def _do_jobs(connection: socket.socket, work: Work, bounds: Bounds) -> None:
    buffer = b""
    while True:
        line, found, buffer = buffer.partition(b"\n")
        if not found:
            piece = connection.recv(_PIECE)
            if not piece:
                return
            buffer = line + piece
        elif line and not buffer:  # behind a job there is nothing yet, or a CANCEL of it
            job = json.loads(line)
            work.prepare(job)
            answer = _in_fork(connection, lambda job=job: work.do(job), bounds)
            if answer is not None:
                connection.sendall(json.dumps({**answer, "id": job["id"]}).encode() + b"\n")


def _in_fork(connection: socket.socket, do: Any, bounds: Bounds) -> dict[str, Any] | None:
    """Return the answer of a bounded fork; None when it was cancelled."""
    read, write = os.pipe()
    parent = os.getpid()
    if (pid := os.fork()) == 0:
        try:
            _die_with(parent)
            os.close(read)
            _mute()
            _limit(bounds)
            _send(write, do())
        finally:
            os._exit(1)
    os.close(write)
    try:
        return _wait(connection, read, pid, bounds)
    finally:
        os.close(read)


def _wait(connection: socket.socket, read: int, pid: int, bounds: Bounds) -> dict[str, Any] | None:
    text, deadline = b"", time.monotonic() + bounds.wall_s
    while True:
        ready = select.select([read, connection], [], [], max(deadline - time.monotonic(), 0))[0]
        if connection in ready or not ready:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            if ready and not connection.recv(1):
                os._exit(0)
            return None if ready else {"exceeded": "wall"}
        if not (piece := os.read(read, _PIECE)):
            break
        text += piece
    status = os.waitpid(pid, 0)[1]
    return dict(json.loads(text)) if text.endswith(b"\n") else {"exceeded": _death(status)}


def _death(status: int) -> str:
    """Return why a job died without an answer: "cpu", or the signal or exit code, mostly of an allocation."""
    if not os.WIFSIGNALED(status):
        return f"exit code {os.waitstatus_to_exitcode(status)}"
    number = os.WTERMSIG(status)
    return "cpu" if number == signal.SIGPROF else signal.Signals(number).name


def _limit(bounds: Bounds) -> None:
    with open("/proc/self/statm") as file:  # noqa: PTH123 - pathlib allocates more
        size = int(file.read().split()[0]) * resource.getpagesize()
    limit = size + bounds.memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.setitimer(signal.ITIMER_PROF, bounds.cpu_s)  # of its processor time; what it does then is die


def _mute() -> None:
    """Let libraries print their last words into nothing: a log of the engine is searched for the cause of its death."""
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.close(null)


def _send(fd: int, answer: dict[str, Any]) -> None:
    text = json.dumps(answer).encode() + b"\n"
    while text:
        text = text[os.write(fd, text) :]
