"""One container: its directory, environment, sockets, process, log and end.

Owns the subprocess and everything that it starts: all of it is killed when the entrypoint ends, as Modal tears down a
sandbox. An interpreter that does not exist is an error. It has no queue: the scheduler sets its callbacks.
"""

from __future__ import annotations

import asyncio
import enum
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from modal_proto import api_pb2 as pb

from . import processes
from .container_process import CHANNEL_OF_A_FORK, ContainerProcess, Start
from .errors import ContainerRuntimeError
from .functions import OfFunction, gpu_of
from .host_ports import HostPorts

if TYPE_CHECKING:
    import grpclib.server

    from .calls import Input
    from .functions import Function
    from .volumes import VolumeView

LAST_OUTPUT_S = 1.0
END_BY_ITSELF_S = 5.0  # for processes whose parent, the entrypoint, has ended
PASSED_ON = ("PATH", "LANG", "TMPDIR")


@dataclass(frozen=True)
class ContainerRuntime:
    """How containers run: an interpreter with the packages that the image installs, and the mounted modal client."""

    python: str | Path = sys.executable
    client_path: Path | None = None  # None: the interpreter has modal itself
    environment: Mapping[str, str] = field(default_factory=dict)
    isolate_network: bool = True
    host_ports: Sequence[int] = ()  # of the host's loopback, reachable under the same numbers inside
    preloaded: Path | None = None  # a socket of `tests.preloaded.serve`: the processes are its forks

    def check(self) -> None:
        """Check that the interpreter can run the client. Raises: ContainerRuntimeError."""
        if not Path(self.python).is_file():
            raise ContainerRuntimeError(f"The container's interpreter {str(self.python)!r} is not a file.")
        command = [str(self.python), "-c", "import sys; print(*sys.version_info[:2], sep='.')"]
        theirs = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        ours = f"{sys.version_info.major}.{sys.version_info.minor}"
        if self.client_path is not None and theirs != ours:
            text = f"The container's interpreter {str(self.python)!r} is Python {theirs or 'of no version'}; "
            text += f"the client directory has compiled packages of Python {ours}. Give one of {ours}."
            raise ContainerRuntimeError(text)


class TaskState(enum.StrEnum):
    """The state of a container: STARTING until it first fetches inputs, STOPPING once it was asked to stop."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    DEAD = "dead"


def _ignore(*event: object) -> None:
    """Do nothing; the default callback for a task's events."""


@dataclass(eq=False)
class Task(OfFunction):
    """One container. Public attributes are read by tests from another thread; `preempt` and `kill` may be called so.

    `definition` is its function's as it was at the start; a later deploy does not change it.
    """

    id: str
    function: Function = field(repr=False)
    definition: pb.Function = field(repr=False)
    work: Path
    socket_directory: Path = field(repr=False)
    is_snapshotting: bool
    loop: asyncio.AbstractEventLoop = field(repr=False)
    state: TaskState = TaskState.STARTING
    exit_code: int | None = None
    pid: int | None = None
    restored: bool = False
    restore_failed: bool = False
    preempted: bool = False
    ready_at: float | None = None
    former_ids: list[str] = field(default_factory=list)
    inputs_served: int = 0
    left_behind: list[int] = field(default_factory=list)  # processes that would have outlived the entrypoint
    result: pb.GenericResult | None = None
    inputs: list[Input] = field(default_factory=list, repr=False)
    volume_views: list[VolumeView] = field(default_factory=list, repr=False)
    servers: list[grpclib.server.Server] = field(default_factory=list, repr=False)
    cancelled_inputs: list[str] = field(default_factory=list, repr=False)
    changed: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    stopping: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    died: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    stopped_at: float = 0.0  # since when it takes no inputs
    finished_at: float = 0.0
    started_at: float = field(default_factory=time.time)
    namespace: str | None = field(default=None, repr=False)
    host_ports: HostPorts | None = field(default=None, repr=False)
    on_line: Callable[[Task, str], None] = field(default=_ignore, repr=False)
    on_stop: Callable[[Task], None] = field(default=_ignore, repr=False)
    on_death: Callable[[Task], None] = field(default=_ignore, repr=False)

    @property
    def gpu(self) -> str | None:
        return gpu_of(self.definition)

    @property
    def root(self) -> Path:
        return self.work / "root"

    @property
    def log(self) -> str:
        path = self.work / "log.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def is_live(self) -> bool:
        return self.state in (TaskState.STARTING, TaskState.READY)

    @property
    def arguments_path(self) -> Path:
        return self.work / "arguments.bin"

    @property
    def state_path(self) -> Path:
        return self.work / "restore-state.json"

    @property
    def spec_environ_path(self) -> Path:
        return self.work / "spec-environ"

    @property
    def gpu_restore_path(self) -> Path:
        return self.work / "gpu-restore"

    def become_ready(self) -> None:
        self.state, self.ready_at = TaskState.READY, time.time()

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def members(self) -> list[int]:
        """List the live processes of the container."""
        return processes.members(self._marks(self.pid)) if self.pid else []

    def _marks(self, pid: int) -> processes.Marks:
        arguments = f"MODAL_CONTAINER_ARGUMENTS_PATH={self.arguments_path}".encode()
        return processes.Marks(pid, self.namespace, arguments)

    def open_files(self, directory: Path) -> list[Path]:
        return processes.open_files(self.members(), directory.resolve())

    def note_namespace(self) -> None:
        """Remember the network namespace, by which processes in sessions of their own are found."""
        if self.pid and self.namespace is None:
            self.namespace = processes.network_namespace(self.pid)

    async def boot(self, runtime: ContainerRuntime, environment: Mapping[str, str], ports: Sequence[int]) -> None:
        """Start the process and follow it; returns at once. The task is dead when `died` is set."""
        host_ports = self.host_ports = HostPorts(ports)
        channel = host_ports.container_end.fileno()
        spec = {
            "isolate_network": runtime.isolate_network,
            "client_path": str(runtime.client_path) if runtime.client_path else "",
            "spec_environ_path": str(self.spec_environ_path),
            "gpu_restore_path": str(self.gpu_restore_path),
            "host_ports": list(ports),
            "volume_sizes": {
                str(v.path): v.volume.capacity_bytes for v in self.volume_views if v.volume.capacity_bytes
            },
            "host_ports_fd": CHANNEL_OF_A_FORK if runtime.preloaded else channel,
        }
        spec_path = self.work / "spec.json"
        spec_path.write_text(json.dumps(spec))
        self.spec_environ_path.write_text("\0".join(f"{k}={v}" for k, v in environment.items()))
        self.gpu_restore_path.touch()
        reading, writing = os.pipe()  # not asyncio's PIPE: its wait() also waits for all that inherited the pipe
        start = Start(spec_path, self.root, environment, writing, channel)
        if runtime.preloaded:
            process = await start.in_fork(runtime.preloaded)
        else:
            process = await start.with_interpreter(str(runtime.python))
        os.close(writing)
        host_ports.follow()
        self.pid = process.pid
        for view in self.volume_views:
            view.note_process(process.pid)
        self._following = asyncio.ensure_future(self._follow(process, reading))

    async def _follow(self, process: ContainerProcess, reading: int) -> None:
        output = asyncio.ensure_future(self._keep(reading))
        self.exit_code = await process.wait()
        self.left_behind = await processes.stragglers(self._marks(process.pid), END_BY_ITSELF_S)
        await processes.end(self._marks(process.pid))
        self.namespace = None  # the kernel may reuse its number for the next container
        await asyncio.wait([output], timeout=LAST_OUTPUT_S)  # all processes that could hold the pipe are dead
        output.cancel()
        self.bury()

    def bury(self) -> None:
        """Close the container's sockets and report it dead."""
        for server in self.servers:
            server.close()
        if self.host_ports is not None:
            self.host_ports.close()
        self.state, self.finished_at = TaskState.DEAD, time.time()
        self.stopped_at = self.stopped_at or self.finished_at
        self.wake()
        self.on_death(self)
        self.died.set()

    async def _keep(self, reading: int) -> None:
        output = asyncio.StreamReader()
        with os.fdopen(reading, "rb", buffering=0) as pipe, (self.work / "log.txt").open("ab", buffering=0) as log:
            await self.loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(output), pipe)
            while chunk := await output.read(65536):
                log.write(chunk)
                self.on_line(self, chunk.decode(errors="replace"))

    def stop(self) -> None:
        """Send the container no more inputs; it then runs its exit hooks and ends."""
        self.stopping.set()
        if self.is_live:
            self.state, self.stopped_at = TaskState.STOPPING, time.time()
            self.wake()
            self.on_stop(self)

    async def stop_within(self, grace_s: float) -> None:
        """Stop the container; kill it if it has not ended after the grace."""
        self.stop()
        await self._kill_after(grace_s)

    async def interrupt_within(self, grace_s: float) -> None:
        """Preempt: SIGINT now, SIGKILL after the grace."""
        self.preempted = True
        self.stop()
        if self.pid and not self.died.is_set():
            processes.send([self.pid], signal.SIGINT)
        await self._kill_after(grace_s)

    async def _kill_after(self, grace_s: float) -> None:
        try:
            async with asyncio.timeout(grace_s):
                await self.died.wait()
        except TimeoutError:
            await self.end()

    async def end(self) -> None:
        """Kill every process of the container and wait until it is dead."""
        if self.pid and not self.died.is_set():
            self.note_namespace()
            await processes.end(self._marks(self.pid))
            await self.died.wait()

    def preempt(self, grace_s: float = 30.0) -> None:
        """Preempt the container as Modal does: SIGINT, a grace, SIGKILL. Returns at once."""
        asyncio.run_coroutine_threadsafe(self.interrupt_within(grace_s), self.loop)

    def kill(self) -> None:
        """Kill the container without notice, as the kernel would. Returns once it is dead."""
        asyncio.run_coroutine_threadsafe(self.end(), self.loop).result(10)


def base_environment(root: Path) -> dict[str, str]:
    """Return a container's environment before those of its image, its secrets and Modal."""
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {**passed, "HOME": str(root), "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"}
