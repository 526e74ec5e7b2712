"""The service that things are done to: the real command with two models, on a small disk and a clock of its own.

`tiny` is the model that the command is started for: it ends when that engine dies. `twin` is another model of the
registry: its engine is replaced. `distant` has its weights on a hub on loopback, and is never started.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil

from bench.chaos.load import ask
from bench.chaos.oom import MemoryGroup
from bench.chaos.requests import ADMIN, KEYS, draw
from service.registry.models import Registry
from tests.engine.running import ONE_THREAD, Service, free_port
from tests.fakes.hub import Hub, Repository, serving
from tests.system import programs

MODELS = ["tiny", "twin"]
HANG_S = 10
DISK_MIB = 256
_POLL_S = 0.05
_SETTLE_S = 5.0  # until what has ended is gone
_STOP_S = 15.0
_BOOT_LIMIT_S = 150.0
_CONNECTIONS = 64  # that clients and engines may have kept
_MODELS = f"""
[models.twin]
path = "twin"
max_model_len = 2048
weights_gb = 0.004

[models.distant]
hub_id = "me/distant"
revision = "{"a" * 40}"
gpu = "L4"
max_model_len = 2048
weights_gb = 0.004
"""
_CLOCK = Path(__file__).with_name("clock.c")


@dataclass(frozen=True)
class Engine:
    """The processes of one engine."""

    leader: psutil.Process
    core: psutil.Process
    others: list[psutil.Process]

    @property
    def all(self) -> list[psutil.Process]:
        """Every one of them, the leader first."""
        return [self.leader, self.core, *self.others]


class Stopwatch:
    """Seconds since now, less those in which the service waited for a processor: other programs may have taken it."""

    def __init__(self, site: Site) -> None:
        self._site, self._began, self._waited = site, time.monotonic(), site.waited_s()

    @property
    def seconds(self) -> float:
        """What it shows."""
        waited = {pid: seconds - self._waited.get(pid, 0.0) for pid, seconds in self._site.waited_s().items()}
        return time.monotonic() - self._began - sum(waited.values())


class Site:
    """The service, and what is around it.

    Args:
        directory: For everything; it is empty.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.disk = directory, directory / "disk"
        self._clock = directory / "clock.so"
        self.boot_s = 0.0
        self.port = free_port()
        self.memory = MemoryGroup(directory.name)
        self._usual_threads = self._usual_files = 0
        self._service: Service | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Site:
        """Make its disk, its clock and its models."""
        self.disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "chaos", str(self.disk)]
        self.has_own_disk = os.getuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
        for name in ("tmp", "state"):
            (self.disk / name).mkdir()
        shutil.copytree(Registry.load().resolve("tiny").spec.directory or "", self.directory / "twin")
        (self.directory / "models.toml").write_text(_MODELS)
        files = {file.name: file.read_bytes() for file in (self.directory / "twin").iterdir()}
        self.hub = self._stack.enter_context(serving(Hub(repositories={"me/distant": Repository("a" * 40, files)})))
        self._make_clock()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing running and no disk."""
        if self._service:
            self._service.__exit__()
        for process in self._marked():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self.has_own_disk:
            subprocess.run(["umount", "-l", str(self.disk)], check=True)
        self.memory.remove()
        self._stack.close()

    def _make_clock(self) -> None:
        file = self.directory / "clock"
        self.move_clock(0)
        defined = f'-DOFFSET_FILE="{file}"'
        subprocess.run(
            [programs.find("cc"), "-O1", "-shared", "-fPIC", defined, "-o", str(self._clock), str(_CLOCK)], check=True
        )

    def move_clock(self, seconds: int) -> None:
        """Move the wall clock of every process of the service so far from the machine's."""
        file = self.directory / "clock"
        with file.open("r+b" if file.exists() else "wb") as offset:
            offset.write(struct.pack("@l", seconds))

    @property
    def service(self) -> Service:
        """The running command."""
        assert self._service, "start() comes first"  # noqa: S101 - a programming error
        return self._service

    @property
    def process(self) -> psutil.Process:
        """The process of the running command."""
        return psutil.Process(self.service.pid)

    @property
    def url(self) -> str:
        """Where it listens, whichever command runs."""
        return f"http://127.0.0.1:{self.port}"

    def spawn(self) -> None:
        """Start the command, as a supervisor would that has seen its end."""
        if self._service:
            self._service.__exit__()
        environment = {
            "API_KEYS": ",".join(f"{name}={key}" for name, key in KEYS.items()),
            "API_LIMITS": ADMIN,
            "SERVICE_MODELS_FILE": str(self.directory / "models.toml"),
            "SERVICE_HANG_S": str(HANG_S),
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.directory / "huggingface"),
            "XDG_STATE_HOME": str(self.disk / "state"),
            "TMPDIR": str(self.disk / "tmp"),
            "LD_PRELOAD": str(self._clock),
            **ONE_THREAD,
        }
        self._service = Service(self.directory, "tiny", port=self.port, prefix=self.memory.prefix, **environment)
        self._service.__enter__()

    async def start(self, rng: random.Random) -> None:
        """Start both engines, and measure how long the slower boot takes."""
        self.spawn()
        for model in MODELS:
            watch = Stopwatch(self)
            if not await self.is_ready(rng, model, watch, _BOOT_LIMIT_S):
                raise AssertionError(f"{model} was not ready after {_BOOT_LIMIT_S:g} s\n{self.service.story}")
            self.boot_s = max(self.boot_s, watch.seconds)

    async def is_ready(self, rng: random.Random, model: str, watch: Stopwatch, limit_s: float) -> bool:
        """Ask a model until it has answered right; tell whether it did before the watch showed the limit."""
        async with aiohttp.ClientSession() as http:
            began = time.monotonic()
            while (await ask(http, self.url, draw(rng, [model]), _BOOT_LIMIT_S)).code:
                if time.monotonic() - began > _BOOT_LIMIT_S or self.service.ended:
                    return False
                await asyncio.sleep(_POLL_S)
        return watch.seconds <= limit_s

    def stop(self) -> list[str]:
        """End the command as Ctrl-C does; return what is wrong with its end, and what it has left."""
        self.service.signal()
        try:
            code = self.service.wait_ended(_STOP_S)
        except AssertionError:
            return [f"the command had not ended {_STOP_S:g} s after SIGINT"]
        wrong = [] if code == 0 else [f"the command ended with code {code}"]
        return wrong + self.left_of_all()

    def leaders(self, model: str) -> list[psutil.Process]:
        """Return the first process of each engine of a model."""
        directory = str(self.directory / "twin") if model == "twin" else str(Path("assets", "tiny"))
        return [leader for leader in self._all_leaders() if any(word.endswith(directory) for word in _command(leader))]

    def _all_leaders(self) -> list[psutil.Process]:
        return [child for child in self.process.children() if "vllm_service.main" in _command(child)]

    def engine(self, model: str) -> Engine | None:
        """Return the processes of a model's engine; None: it has none that is whole."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for leader in self.leaders(model):
                children = leader.children(recursive=True)
                cores = [child for child in children if _is_core(child)]
                if cores:
                    return Engine(leader, cores[0], [child for child in children if child != cores[0]])
        return None

    def waited_s(self) -> dict[int, float]:
        """Return how long the first threads of the service and its engines have waited for a processor, by process."""
        waited: dict[int, float] = {}
        processes: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            processes += [self.process, *self._all_leaders()]
            processes += [child for leader in processes[1:] for child in leader.children() if _is_core(child)]
        for process in processes:
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                waited[process.pid] = int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[1]) / 1e9
        return waited

    def leader_ids(self) -> dict[str, int]:
        """Return the process id of each model's engine."""
        engines = {model: self.engine(model) for model in MODELS}
        return {model: engine.leader.pid for model, engine in engines.items() if engine}

    def ports(self) -> set[int]:
        """Return the ports of the engines."""
        found = set()
        for model in MODELS:
            if engine := self.engine(model):
                connections = engine.leader.net_connections("tcp")
                found |= {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}
        return found

    def learn(self) -> None:
        """Take what is there now, with both engines ready and after some load, as what is usual."""
        self._usual_threads = self.process.num_threads()
        self._usual_files = self._files()

    @property
    def access_file(self) -> Path:
        """The running command's request log."""
        return self.service.log_file.with_name(f"access-{self.port}.log")

    def left_of_all(self) -> list[str]:
        """Return which processes have outlived the command, after a while."""
        return polled(lambda: [f"left: {_shown(process)}" for process in self._marked()])

    def left(self) -> list[str]:
        """Return what is there that should not be, after a while for what is ending."""
        return polled(self._left)

    def _left(self) -> list[str]:
        service = self.process
        ours = {service, *service.children(recursive=True)}
        leaders = self._all_leaders()
        left = [f"no child of the service: {_shown(process)}" for process in self._marked() if process not in ours]
        left += [f"not reaped: {_shown(process)}" for process in ours if process.status() == psutil.STATUS_ZOMBIE]
        directories = list((self.disk / "tmp").glob("vllm-service-*"))
        if len(leaders) > len(MODELS) or len(directories) > len(leaders):
            left.append(f"{len(directories)} directories of {len(leaders)} engines: {directories}")
        left += [f"file {path.name}" for path in (self.disk / "tmp").iterdir() if path not in directories]
        if self._usual_files and (files := self._files()) > self._usual_files:
            left.append(f"{files} descriptors beside connections, usual are {self._usual_files}")
        connections = service.net_connections("tcp")
        if len(connections) > _CONNECTIONS:
            left.append(f"{len(connections)} connections")
        return left

    def _files(self) -> int:
        """Return how many descriptors the command has that are no connections."""
        service = self.process
        return service.num_fds() - len(service.net_connections("inet"))

    def _marked(self) -> Iterator[psutil.Process]:
        """Yield every process that has this site's clock; an engine core overwrites its environment with its name."""
        mark = str(self._clock).encode()
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if mark in (directory / "maps").read_bytes():
                    yield psutil.Process(int(directory.name))


def polled(look: Callable[[], list[str]]) -> list[str]:
    """Return what is still wrong after a while in which it may settle."""
    deadline = time.monotonic() + _SETTLE_S
    while (left := look()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return left


def _is_core(process: psutil.Process) -> bool:
    return any("EngineCore" in word for word in _command(process))


def _command(process: psutil.Process) -> list[str]:
    """Return the command line of a process; one that has ended has none."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def _shown(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return f"process {process.pid} {' '.join(process.cmdline())[:80]} ({process.status()})"
    return f"process {process.pid}"
