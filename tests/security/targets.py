"""What the attacks aim at: a gateway as `vllm-service up` serves it, and an engine behind nothing but its guard."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from service.engine import environment
from service.files import user_directory
from tests.engine.guarded import guarded
from tests.engine.routes import registered_routes
from tests.engine.running import serving, session_members

TINY = Path(__file__).parents[2] / "service" / "assets" / "tiny"
KEY, OTHER_KEY = "sk-Attacked-6d1f0cB2e8", "sk-Bystander-93acE7"
COLD = "cold"  # a model that no request with a key ever names
EMBEDDING = "vectors"
_HARM = re.compile(r"Traceback \(most recent call last\)|Exception in ASGI application|exception was never retrieved")
MODELS = f"""
[models.{COLD}]
path = "{TINY}"

[models.{EMBEDDING}]
path = "{TINY}"
extra_args = ["--runner", "pooling"]
"""
# Of engines, and of vLLM itself; not the environments, which nothing writes to once they are built.
CACHES = tuple(user_directory("XDG_CACHE_HOME", "~/.cache") / name for name in ("vllm", "vllm-service/compiled"))
_ANSWER_S = 120


@dataclass(frozen=True)
class Answer:
    """An HTTP response; names of headers are in lower case. Status 0: the connection was closed without one."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def error(self) -> dict[str, Any]:
        """The error in its body; empty when there is none."""
        with contextlib.suppress(ValueError):
            found = json.loads(self.body)
            if isinstance(found, dict) and isinstance(found.get("error"), dict):
                return dict(found["error"])
        return {}


class Connection:
    """Sends requests byte by byte over a connection, which it opens again where the server has closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None

    def ask(self, request: bytes, *, has_body: bool = True) -> Answer:
        """Send a request and return its answer.

        Args:
            request: Head and body.
            has_body: Whether the answer may have one, which that to a HEAD has not.
        """
        for is_new in (self._socket is None, True):
            answer = self._try(request, has_body)
            if answer.status or is_new:  # the server may have closed a connection that was idle
                return answer
        raise AssertionError("the second attempt is on a new connection")

    def close(self) -> None:
        """Close it."""
        if self._socket:
            self._reader.close()
            self._socket.close()
            self._socket = None

    def _try(self, request: bytes, has_body: bool) -> Answer:
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=_ANSWER_S)
            self._reader = self._socket.makefile("rb")
        answer = Answer(0)
        with contextlib.suppress(ConnectionError):
            with contextlib.suppress(ConnectionError):  # it may have answered and closed before it had read all
                self._socket.sendall(request)
            answer = self._read(has_body)
        if not answer.status or answer.headers.get("connection") == "close":
            self.close()
        return answer

    def _read(self, has_body: bool) -> Answer:
        _, _, rest = self._reader.readline().partition(b" ")
        if not rest:
            return Answer(0)
        status, headers = int(rest[:3]), {}
        while line := self._reader.readline().strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        if status == 100:
            return self._read(has_body)
        return Answer(status, headers, self._body(headers) if has_body and status not in {204, 304} else b"")

    def _body(self, headers: Mapping[str, str]) -> bytes:
        if "chunked" not in headers.get("transfer-encoding", ""):
            length = headers.get("content-length")
            return self._reader.read(int(length)) if length else self._reader.read()
        body = b""
        while size := int(self._reader.readline() or b"0", 16):
            body += self._reader.read(size)
            self._reader.readline()
        self._reader.readline()
        return body


@dataclass(frozen=True)
class Target:
    """A running service, as its attackers see it and as its operator does.

    Attributes:
        name: `gateway` or `guard`.
        routes: Path -> methods of every route that the service, or the engine behind it, says that it has.
        log: Returns all that it has written to its logs.
        lasting: Returns the process ids of the service and of its engines' first processes, which end when a core does.
        processes: Returns all of its processes that run.
        command: Process id of the command to which its user gave the keys; 0: the tests' own process has them.
        directories: Where it leaves files.
        began: When it was started, as `time.time` has it.
    """

    name: str
    port: int
    routes: Mapping[str, set[str]]
    log: Callable[[], str]
    lasting: Callable[[], set[int]]
    processes: Callable[[], list[psutil.Process]]
    command: int = 0
    directories: tuple[Path, ...] = ()
    began: float = field(default_factory=time.time)

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """Open a connection for as long as it holds."""
        with contextlib.closing(Connection(self.port)) as connection:
            yield connection

    def ask(self, method: str, path: str, body: bytes = b"", key: str = KEY) -> Answer:
        """Make one request with a key."""
        with self.connection() as connection:
            return connection.ask(request(method, path, {"Authorization": f"Bearer {key}"}, body))

    def pids(self) -> set[int]:
        """Return the process ids of what runs."""
        return {process.pid for process in self.processes()}

    def descriptors(self) -> int:
        """Return how many file descriptors its processes have open."""
        return sum(process.num_fds() for process in self.processes())

    def memory(self) -> int:
        """Return the bytes of memory that are its own, of all its processes."""
        return sum(process.memory_full_info().uss for process in self.processes())

    @contextmanager
    def unharmed(self) -> Iterator[None]:
        """Insist that it lives on, with the processes that it had, and that no traceback came into its logs."""
        lasting, logged = self.lasting(), len(self.log())
        yield
        assert lasting <= self.lasting(), f"{self.name}: a process died\n{self.log()[-4000:]}"
        answer = self.ask("POST", "/v1/completions", b'{"model": "tiny", "prompt": "Hi", "max_tokens": 1}')
        assert answer.status == 200, answer
        harm = harm_in(self.log()[logged:])
        assert not harm, f"{self.name}: {len(harm)} tracebacks\n{harm[0]}"


def harm_in(log: str) -> list[str]:
    """Return the tracebacks in a log, each with what is around it."""
    return [log[max(0, found.start() - 500) : found.start() + 4000] for found in _HARM.finditer(log)]


def request(method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
    """Return the bytes of a request with a body of JSON."""
    lines = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


@contextmanager
def gateway(directory: Path) -> Iterator[Target]:
    """Serve the tiny model behind the gateway and two keys, and two further models of which none is started."""
    environment.ensure()
    models = directory / "models.toml"
    models.write_text(MODELS)
    settings = {
        "API_KEYS": f"attacked={KEY},bystander={OTHER_KEY}",
        "API_LIMITS": '{"attacked": {"admin": true}}',
        "SERVICE_MODELS_FILE": str(models),
    }
    began = time.time()
    with TemporaryDirectory() as temporary, serving(directory, "tiny", TMPDIR=temporary, **settings) as service:

        def processes() -> list[psutil.Process]:
            own = psutil.Process(service.pid)
            return [own, *own.children(recursive=True)]

        yield Target(
            name="gateway",
            port=service.port,
            routes=registered_routes(service.log_file.read_text(), service.url),
            log=lambda: service.err + service.log_file.read_text(errors="replace"),
            lasting=lambda: {service.pid, *(child.pid for child in psutil.Process(service.pid).children())},
            processes=processes,
            command=service.pid,
            directories=(directory, Path(temporary), *CACHES),
            began=began,
        )


@contextmanager
def guard(extra_args: tuple[str, ...] = ()) -> Iterator[Target]:
    """Serve the tiny model behind the guard alone, with two keys and further arguments of its registry entry."""
    lines: list[str] = []
    began = time.time()
    with _collected(lines), guarded(environment.ensure(), (KEY, OTHER_KEY), extra_args) as engine:
        yield Target(
            name="guard",
            port=engine.port,
            routes=engine.routes,
            log=lambda: "\n".join(lines),
            lasting=lambda: {process.pid for process in session_members(engine.pid)} & {engine.pid},
            processes=lambda: session_members(engine.pid),
            directories=CACHES,
            began=began,
        )


@contextmanager
def _collected(lines: list[str]) -> Iterator[None]:
    """Collect what the engines of this process write."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    output, collector = logging.getLogger("service.engine.output"), Collector()
    before = output.level
    output.setLevel(logging.INFO)
    output.addHandler(collector)
    try:
        yield
    finally:
        output.removeHandler(collector)
        output.setLevel(before)
