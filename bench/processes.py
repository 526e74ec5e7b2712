"""Servers, started as a user starts them and timed from their spawn to the first 200 of /health."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from service.registry.models import Registry

POLL_S = 0.05
LIMIT_S = 180.0


def service(port: int) -> list[str]:
    """Return the command that serves the tiny model."""
    os.environ["SERVICE_PORT"] = str(port)
    return [str(Path(sys.executable).parent / "vllm-service"), "up", "tiny"]


def plain_vllm(python: str, port: int) -> list[str]:
    """Return vLLM's own command for the tiny model."""
    model = Registry.load().resolve("tiny").spec.directory
    entry = "vllm.entrypoints.launchers.api_server.entry"  # what `vllm serve` runs; the CPU build lacks the command
    flags = ["--enforce-eager", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048"]
    flags += ["--kv-cache-memory-bytes", str(64 * 1024**2)]  # as small as ours: else it claims nearly all memory
    return [python, "-m", entry, "--model", str(model), *flags]


@dataclass(frozen=True)
class Timed:
    """One boot of a command.

    Attributes:
        command: Returns the command for a port.
        poll_s: Seconds between two requests to /health.
        look: Called with the process id once the server is ready.
    """

    command: Callable[[int], list[str]]
    poll_s: float = POLL_S
    look: Callable[[int], None] = lambda _: None

    def boot(self) -> float:
        """Return the seconds from the spawn to the first 200 of /health; stop the server afterwards."""
        port = free_port()
        argv = self.command(port)
        began = time.monotonic()
        with running(argv) as process:
            wait_healthy(process, port, self.poll_s)
            seconds = time.monotonic() - began
            self.look(process.pid)
            return seconds


@contextmanager
def running(argv: list[str], grace_s: float = 15, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the end of the block, or of this process; its children and files end with it.

    Args:
        argv: Its command.
        grace_s: Seconds from SIGINT to SIGKILL.
        env: Variables beside those of this process.
    """
    with TemporaryDirectory() as state:
        variables = {**os.environ, "XDG_STATE_HOME": state, "TMPDIR": state, "VLLM_NO_USAGE_STATS": "1", **env}
        process = subprocess.Popen(
            argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=variables, start_new_session=True
        )
        with killed_with_us(process.pid, state):
            try:
                yield process
            finally:
                _end(process, grace_s)


@contextmanager
def killed_with_us(pgid: int, directory: str = "") -> Iterator[None]:
    """Kill a process group, and remove a directory, when this process ends before the block, however it ends."""
    end = ["sh", "-c", 'read -r _; kill -s KILL -- "-$1"; rm -rf "$2"', "sh", str(pgid), directory]
    with subprocess.Popen(end, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True) as watcher:
        try:
            yield
        finally:
            watcher.kill()


def wait_healthy(process: subprocess.Popen[bytes], port: int, poll_s: float = POLL_S) -> None:
    """Wait for the first 200 of /health; end this program when the server ends or takes too long."""
    deadline = time.monotonic() + LIMIT_S
    while not _healthy(port):
        if process.poll() is not None:
            raise SystemExit(f"{process.args!r} ended with {process.returncode} before it was ready")
        if time.monotonic() > deadline:
            raise SystemExit(f"{process.args!r} was not ready after {LIMIT_S:.0f} s")
        time.sleep(poll_s)


def free_port() -> int:
    """Return a free port of loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def first_token(port: int) -> None:
    """Generate one token; blocks until it has arrived."""
    body = {"model": "llm", "prompt": "The capital of France", "max_tokens": 1}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.read()


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    members = [member for member in psutil.process_iter() if _is_in_session(member, process.pid)]
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # it, and its children where it died before them
    process.wait()
    psutil.wait_procs(members, timeout=10)


def _is_in_session(member: psutil.Process, leader: int) -> bool:
    with suppress(ProcessLookupError, PermissionError):
        return os.getsid(member.pid) == leader
    return False
