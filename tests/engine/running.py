"""A service started as a user starts it: the command line in a process of its own, on a free loopback port."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
POLL_S = 0.02
BOOT_S = 150  # about 10 s on two idle cores; the machine of a test is not always idle
GONE_S = 10
# Engines of the tests compute with one thread each. Several workers with an engine each share two cores, and OpenMP's
# threads wait for each other by spinning: on such a machine 16 answers of 300 tokens took 19.7 s of processor time with
# two threads and 1.0 s with one.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
# What users' shells and platforms set beside the service: none of it may reach an engine, and none may stop one.
CANARY = "t0pcanary"
FOREIGN = {
    **dict.fromkeys(("OPENAI_API_KEY", "NVIDIA_API_KEY", "HF_TOKEN", "AWS_ACCESS_KEY_ID"), CANARY),
    **dict.fromkeys(("AWS_SECRET_ACCESS_KEY", "MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET", "VLLM_API_KEY"), CANARY),
    **{"DATABASE_URL": f"postgres://user:{CANARY}@db/x", "NO_PROXY": f"127.0.0.1,localhost,{CANARY}"},
    **{"VLLM_PORT": "tcp://10.0.0.1:8000", "VLLM_SERVICE_HOST": "10.0.0.1", "VLLM_SERVICE_PORT": "8000"},
    **{"VLLM_PORT_8000_TCP": "tcp://10.0.0.1:8000", "VLLM_PORT_8000_TCP_ADDR": "10.0.0.1"},
}
_OURS = ("SERVICE_", "API_KEY", "HF_TOKEN", "OTEL_")


class Service:
    """`vllm-service up <arguments>` with its outputs in files.

    Args:
        directory: Where its outputs and its state go.
        arguments: After `up`.
        port: Where it is told to listen; by default a free one.
        name: What its outputs are called.
        prefix: A command that runs the command, such as `nohup`.
        environment: Variables set beside the test's own, of which none of the service's is passed on.
    """

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        port: int | None = None,
        name: str = "service",
        prefix: Sequence[str] = (),
        **environment: str,
    ) -> None:
        self.directory = directory
        self._out, self._err = directory / f"{name}.out", directory / f"{name}.err"
        self.port = free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self._cwd = REPOSITORY
        self._command = [*prefix, sys.executable, "-m", "service.cli.main", "up", *arguments]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
        state = {"XDG_STATE_HOME": str(directory), "SERVICE_PORT": str(self.port)}
        self.environment = {**inherited, **state, **environment}
        self.began = 0.0
        self.port_while_starting = ("", "")
        self._session = -1

    def __enter__(self) -> Self:
        """Start it; it is not ready yet."""
        self.began = time.monotonic()
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = self._spawn(stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        return self

    def _spawn(self, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, cwd=self._cwd, env=self.environment, **options)

    def __exit__(self, *_: object) -> None:
        """Leave nothing running, however the test ended."""
        for process in [*self.engine(), *self._descendants()]:
            _kill(process)
        if not self.ended:
            self._process.kill()
        self._process.wait()

    @property
    def pid(self) -> int:
        """Process id of the command."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the command has ended."""
        return self._process.poll() is not None

    @property
    def out(self) -> str:
        """What it has printed to stdout."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        """What it has printed to stderr."""
        return self._err.read_text()

    @property
    def error(self) -> str:
        """The line of stderr with its error; the hint, where there is one, is the line after it."""
        return next(line for line in reversed(self.err.splitlines()) if line.startswith("error: "))

    @property
    def log_file(self) -> Path:
        """The engine's output."""
        return Path(self.environment["XDG_STATE_HOME"]) / "vllm-service" / f"engine-{self.port}.log"

    @property
    def access_log(self) -> list[dict[str, Any]]:
        """The gateway's line of each request that has ended."""
        lines = self.log_file.with_name(f"access-{self.port}.log").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def story(self) -> str:
        """All that it and its engine said, for the message of a failed test."""
        log = self.log_file.read_text(errors="replace") if self.log_file.exists() else ""
        return f"--- out\n{self.out}\n--- err\n{self.err}\n--- engine\n{log[-4000:]}"

    def wait_ready(self) -> Self:
        """Wait until it says that it is ready."""
        wait_until(lambda: "Ready after" in self.out or self.ended, BOOT_S, self)
        assert not self.ended, f"It ended with {self._process.returncode}.\n{self.story}"
        return self

    def wait_said(self, words: str) -> Self:
        """Wait until it says these words on stderr."""
        wait_until(lambda: words in self.err or self.ended, BOOT_S, self)
        assert words in self.err, self.story
        return self

    def wait_ended(self, timeout_s: float = BOOT_S) -> int:
        """Wait until the command has ended and return its exit code."""
        wait_until(lambda: self.ended, timeout_s, self)
        return self._process.wait()

    def signal(self, number: int = signal.SIGINT) -> float:
        """Send the command a signal and return when, as `time.monotonic` has it."""
        os.kill(self.pid, number)
        return time.monotonic()

    def leader(self) -> psutil.Process:
        """Return the engine's first process, which leads its session and its group."""
        leaders = (child for child in psutil.Process(self.pid).children() if "vllm_service.main" in child.cmdline())
        leader = min(leaders, key=lambda process: process.create_time())  # others serve further models
        self._session = leader.pid
        return leader

    def engine(self) -> list[psutil.Process]:
        """Return every process of the engine that runs: the members of its leader's session."""
        if self._session < 0 and not self.ended:
            with contextlib.suppress(ValueError, psutil.NoSuchProcess):  # there is none yet, or none any more
                self.leader()
        return session_members(self._session) if self._session > 0 else []

    def probe_port(self) -> None:
        """Keep in `port_while_starting` the errors that listening on its port and connecting to it gave."""
        listening = connecting = ""
        try:
            socket.create_server(("127.0.0.1", self.port)).close()
        except OSError as error:
            listening = os.strerror(error.errno or 0)
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError as error:
            connecting = os.strerror(error.errno or 0)
        self.port_while_starting = (listening, connecting)

    def wait_gone(self, deadline: float) -> None:
        """Wait until no process of the engine runs and its port is free again.

        Args:
            deadline: As `time.monotonic` has it.
        """
        assert self._session > 0, "look at the engine's processes before they go: call engine()"
        # a process counts as gone when its first thread is: the port comes free with the last
        gone = lambda: not self.engine() and port_is_free(self.port)  # noqa: E731 - it is said in one line
        wait_until(gone, max(deadline - time.monotonic(), POLL_S), self)

    def _descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True) if not self.ended else []


@contextlib.contextmanager
def serving(directory: Path, *arguments: str, **environment: str) -> Iterator[Service]:
    """Serve until the block ends; Ctrl-C ends the service then, with code 0, and leaves nothing of it."""
    with Service(directory, *arguments, **environment) as service:  # type: ignore[arg-type]  # a name is not checked
        service.wait_ready()
        assert service.engine(), service.story
        yield service
        asked = service.signal()
        assert service.wait_ended(GONE_S) == 0, service.story
        service.wait_gone(asked + GONE_S)


def check_stops(running: Callable[[], float], within_s: float = 1.0) -> None:
    """Insist that an engine which is asked again and again has no request when asked after so many seconds."""
    began = asked_at = time.monotonic()
    while running():
        assert asked_at - began < within_s, "it still works on a request that nobody waits for"
        asked_at = time.monotonic()


def requests_running(metrics: str) -> float:
    """Return how many requests an engine works on, by the text of its metrics."""
    line = next(line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running"))
    return float(line.rpartition(" ")[2])


def session_members(session: int) -> list[psutil.Process]:
    """Return the processes of a session, less those that only wait to be reaped."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return members


def wait_until(happened: Callable[[], bool], timeout_s: float, service: Service | None = None) -> None:
    """Poll until something is so, and fail with what the service said when it takes longer."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        if time.monotonic() > deadline:
            raise AssertionError(f"Not within {timeout_s:.1f} s.\n{service.story if service else ''}")
        time.sleep(POLL_S)


def free_port() -> int:
    """Return a port of the loopback that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_is_free(port: int) -> bool:
    """Tell whether a server could listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return False
    return True


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return
