"""The gateway on this machine: a server in the foreground, and its shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.engine.shutdown import LOCAL_SHUTDOWN
from service.gateway.app import Gateway, create_app
from service.gateway.clients import ClientRegistry
from service.gateway.grammars import Grammars
from service.gateway.local_scheduler import LocalScheduler
from service.gateway.metrics import Metrics
from service.gateway.process_limits import raised_process_limits
from service.gateway.router import ModelRouter
from service.in_engine.vllm_service.http_contract import BODY_LIMIT
from service.registry.models import ModelSpec, Registry
from service.settings import Settings

_BACKLOG = 2048
HEAD_LIMIT = 128 * 1024  # bytes of a request line and its headers


def create_local_app(
    registry: Registry,
    default: ModelSpec,
    scheduler: LocalScheduler,
    clients: ClientRegistry,
    metrics: Metrics,
    *,
    python: str,
    settings: Settings,
) -> Gateway:
    """Return the gateway to this machine's engines.

    Args:
        registry: The models that it serves.
        default: The model of requests for `llm`.
        scheduler: Starts and evicts the engines.
        clients: The API clients and their limits.
        metrics: Counts and logs requests.
        python: Interpreter of the engine's environment; it runs the grammar compiler.
        settings: `hold_s`, how long a request is held while its pool wakes.
    """
    router = ModelRouter(registry, default.key, scheduler.pool)
    return create_app(router, clients, metrics, hold_s=settings.hold_s, grammars=Grammars(python))


class LocalServer:
    """Serves until a signal arrives or `end` is called.

    Args:
        app: The gateway.
        address: A bound socket, which does not listen yet.
        scheduler: The engines behind the gateway.
        on_open: Called when the gateway accepts requests.
        on_drain: Called when the drain begins.
    """

    def __init__(
        self,
        app: Gateway,
        address: socket.socket,
        scheduler: LocalScheduler,
        *,
        on_open: Callable[[], None],
        on_drain: Callable[[], None],
    ) -> None:
        config = uvicorn.Config(
            app,
            http=_LimitedHeadProtocol,
            lifespan="on",
            ws="none",
            access_log=False,
            log_config=None,
            log_level="critical",  # the gateway itself logs its failures and every answer that is cut short
            proxy_headers=False,
            server_header=False,
            date_header=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=LOCAL_SHUTDOWN.gateway_s,
        )
        self._server = _Server(config, on_open)
        self._address, self._scheduler, self._on_drain = address, scheduler, on_drain
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None
        self._must_end = False

    def run(self, signals: tuple[signal.Signals, ...]) -> None:
        """Serve; the first of the signals drains, the second kills everything at once. Blocks. Main thread only."""
        with raised_process_limits(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve(signals))

    def end(self) -> None:
        """End at once, from any thread: the engine that the service was started for has died."""
        self._must_end = True
        if self._loop:
            with contextlib.suppress(RuntimeError):  # the loop is closed: serving has ended
                self._loop.call_soon_threadsafe(self._end, 0.0)

    async def _serve(self, signals: tuple[signal.Signals, ...]) -> None:
        self._loop = loop = asyncio.get_running_loop()
        for number in signals:
            loop.add_signal_handler(number, self._on_signal)
        self._scheduler.begin()
        # Connections in TIME_WAIT would keep the port otherwise.
        self._address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self._must_end:
            self._end(0.0)
        try:
            await self._server.serve([self._address])
        finally:
            await (self._ending or self._scheduler.close(0))
            for number in signals:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if not self._ending:
            self._on_drain()
            self._end(None)
        else:
            self._server.force_exit = True
            self._scheduler.kill()

    def _end(self, grace_s: float | None) -> None:
        if not self._ending:
            self._ending = asyncio.ensure_future(self._scheduler.close(grace_s))
            self._ending.add_done_callback(lambda _: self._stop_server())  # until then it answers new requests with 503

    def _stop_server(self) -> None:
        self._server.should_exit = True


class _LimitedHeadProtocol(HttpToolsProtocol):
    """Limits the size of a request's head, which httptools does not."""

    _counted = 0  # bytes of the head so far; while a body arrives: see `on_headers_complete`

    def data_received(self, data: bytes) -> None:
        """Close the connection when a head exceeds the limit."""
        self._counted += len(data)
        super().data_received(data)
        if self._counted > HEAD_LIMIT:
            self.transport.close()

    def on_headers_complete(self) -> None:
        """Restart so far below zero that a body within BODY_LIMIT, which is counted too, stays under the limit."""
        self._counted = -BODY_LIMIT - HEAD_LIMIT
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Start counting the next head."""
        self._counted = 0
        super().on_message_complete()


class _Server(uvicorn.Server):
    """Leaves signals to `LocalServer`, and reports when it listens."""

    def __init__(self, config: uvicorn.Config, on_open: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_open = on_open

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signal handlers as they are."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and report it."""
        await super().startup(sockets)
        if not self.should_exit:
            self._on_open()
