"""A gateway for tests, and what is behind it: engines with scripted answers, and pools that wake on command."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import aiohttp

from service.errors import GpuMemoryError
from service.gateway.app import Extension, Gateway, create_app
from service.gateway.clients import ClientRegistry
from service.gateway.held import HeldRequests
from service.gateway.http_server.exchange import App
from service.gateway.http_server.limits import Limits
from service.gateway.http_server.server import HttpServer
from service.gateway.live_config import LiveConfig
from service.gateway.metrics import Metrics
from service.gateway.origins import OriginPolicy
from service.gateway.pool import Endpoint, OnWake, Pool, WakeError, ignore_wake, unfit
from service.gateway.router import ModelRouter
from service.gateway.spans import Tracing
from service.in_engine.vllm_service.api_error import APIError
from service.registry.models import ModelSpec, Registry
from service.usage.ledger import Ledger

SPECS = {
    "tiny": ModelSpec(key="tiny", path="assets/tiny", aliases=("small",), gpu="L4", task="generate"),
    "other": ModelSpec(key="other", hub_id="Org/Other-1B", gpu="H100"),
}
ASK = {"model": "tiny", "messages": []}
STREAMED = ASK | {"stream": True}
KEYS = {hashlib.sha256(key.encode()).hexdigest(): name for key, name in (("a-key", "alice"), ("b-key", "bob"))}
ALICE, BOB = {"Authorization": "Bearer a-key"}, {"x-api-key": "b-key"}
ALIASES = {"gpt-4o": "other", "claude-*": "other-h200", "claude-haiku-*": "tiny"}
STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n"
    b"x-engine-pid: 7\r\n\r\n"
)


@dataclass
class Request:
    """A request as it came to an engine."""

    line: str
    headers: dict[str, str]
    body: bytes
    gone: asyncio.Event = field(default_factory=asyncio.Event)


Behaviour = Callable[[Request, asyncio.StreamWriter], Awaitable[None]]


class Engine:
    """An HTTP server in the test's own loop, which records its requests."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.requests: list[Request] = []
        self.running = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        assert self._server
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Engine]:
        """Listen within the context."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, backlog=2048)
        try:
            yield self
        finally:
            await self.die()

    async def die(self) -> None:
        """Close everything, as a process that was killed does."""
        assert self._server
        self._server.close()
        for writer in [*self._writers]:
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while request := await _read(reader):
                self.requests.append(request)
                await self._answer(request, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Behave until done, or until the other side is gone."""
        self.running += 1
        work = asyncio.ensure_future(self.behaviour(request, writer))
        watch = asyncio.ensure_future(_gone(reader, writer))
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                request.gone.set()
                raise ConnectionResetError
            await work
        finally:
            self.running -= 1
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)


async def _read(reader: asyncio.StreamReader) -> Request | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    except asyncio.IncompleteReadError:
        return None
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Request(head[0], headers, body)


async def _gone(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while not (reader.at_eof() or writer.transport.is_closing() or reader.exception()):  # noqa: ASYNC110 - no event tells
        await asyncio.sleep(0.01)


def chunk(data: bytes) -> bytes:
    """Frame a chunk of a body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


async def answers(request: Request, writer: asyncio.StreamWriter) -> None:
    """Answer with a little JSON."""
    del request
    body = b'{"id":"x","usage":{"prompt_tokens":3,"completion_tokens":4}}'
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    await writer.drain()


def refuses(status: int, error: Mapping[str, object], **headers: str) -> Behaviour:
    """Return what answers with an error in vLLM's shape."""

    async def behave(request: Request, writer: asyncio.StreamWriter) -> None:
        del request
        body = json.dumps({"error": {"type": "X", "param": None, "code": status, **error}}).encode()
        lines = {"content-type": "application/json", "content-length": str(len(body)), **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        writer.write(f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + body)
        await writer.drain()

    return behave


def streams(*chunks: bytes, pause_s: float = 0.0, ends: bool = True) -> Behaviour:
    """Return what streams these chunks, and goes on in silence unless it `ends`."""

    async def behave(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM)
        for data in chunks:
            writer.write(chunk(data))
            await writer.drain()
            await asyncio.sleep(pause_s)
        if ends:
            writer.write(chunk(b""))
            await writer.drain()
        else:
            await request.gone.wait()

    return behave


class TestPool(Pool):
    """A pool that wakes when the test lets it, with the URL that the test gives it."""

    __test__ = False

    def __init__(self, spec: ModelSpec, location: str = "H100", on_wake: OnWake = ignore_wake) -> None:
        super().__init__(spec, location, 3.95, on_wake)
        self.wakes = 0
        self.may_wake = asyncio.Event()
        self.fails: str | None = None
        self.unfit: str | None = None
        self.full = False
        self.url = ""
        self._endpoint: Endpoint | None = None

    def why_unfit(self, name: str) -> APIError | None:
        """Return the error for the reason that the test gives."""
        return unfit(GpuMemoryError(f"{name}: {self.unfit}")) if self.unfit else None

    @property
    def is_full(self) -> bool:
        """Whether the test says so."""
        return self.full

    def endpoint(self) -> Endpoint | None:
        """Return the endpoint once it is awake."""
        return self._endpoint

    async def wake(self) -> Endpoint:
        """Wake when the test says so."""
        self.wakes += 1
        await self.may_wake.wait()
        if self.fails:
            raise WakeError(self.fails)
        self._endpoint = Endpoint(self.url, {"model": self.spec.key}, {"Authorization": "Bearer of-the-pool"})
        return self._endpoint

    def mark_unreachable(self) -> None:
        """Sleep again."""
        self._endpoint = None

    async def stop(self) -> None:
        """Sleep again."""
        self._endpoint = None


@dataclass
class RunningGateway:
    """A gateway that listens, its pools, its request log, and a client's connections to it."""

    url: str
    pools: dict[str, TestPool]
    http: aiohttp.ClientSession
    app: Gateway
    lines: list[str]

    def post(
        self, body: object, path: str = "/v1/chat/completions", **options: object
    ) -> aiohttp.client._RequestContextManager:
        """POST JSON."""
        return self.http.post(self.url + path, json=body, **options)  # type: ignore[arg-type]


@asynccontextmanager
async def serve_gateway(
    clients: ClientRegistry | None = None,
    *,
    origins: OriginPolicy | None = None,
    hold_s: float = 60.0,
    comment_interval_s: float = 60.0,
    url: str = "",
    limits: Limits | None = None,
    registry: Registry | None = None,
    live: Callable[[ModelRouter, ClientRegistry], LiveConfig] | None = None,
    ledger: Ledger | None = None,
    held: HeldRequests | None = None,
    tracing: Tracing | None = None,
    extension: Extension | None = None,
) -> AsyncIterator[RunningGateway]:
    """Serve a gateway on loopback; its pools wake at `url` at once where one is given, and no wait sends comments."""
    pools: dict[str, TestPool] = {}
    lines: list[str] = []
    metrics = Metrics(lines.append, ledger)

    def pool(spec: ModelSpec, gpu: object) -> TestPool:
        key = spec.key if gpu is None else f"{spec.key} {gpu.name}"  # type: ignore[attr-defined]
        if key not in pools:
            pools[key] = TestPool(spec, on_wake=metrics.count_wake)
            pools[key].url = url
            if url:
                pools[key].may_wake.set()
        return pools[key]

    router = ModelRouter(registry or Registry(SPECS, ALIASES), "tiny", pool)
    clients = clients or ClientRegistry({})
    app = create_app(
        router,
        clients,
        metrics,
        hold_s=hold_s,
        comment_interval_s=comment_interval_s,
        origins=origins,
        config=live(router, clients) if live else None,
        held=held,
        tracing=tracing,
        extension=extension,
    )
    async with (
        serving(app, limits) as url_of_gateway,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
    ):
        yield RunningGateway(url_of_gateway, pools, http, app, lines)


@asynccontextmanager
async def serving(app: App, limits: Limits | None = None) -> AsyncIterator[str]:
    """Serve an ASGI application on loopback, and return its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = HttpServer(app, limits)
    await server.start([listener])
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        await server.stop(5)


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Let this process open nothing more within the context."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def eventually(true: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Poll until something holds."""
    async with asyncio.timeout(timeout_s):
        while not true():  # noqa: ASYNC110 - it is state, not an event
            await asyncio.sleep(0.01)
