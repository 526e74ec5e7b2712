"""The gateway on this machine: a server in the foreground, and its shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import uvloop

from service.engine.shutdown import LOCAL_SHUTDOWN
from service.gateway.app import Extension, Gateway, create_app
from service.gateway.clients import ClientRegistry
from service.gateway.held import HeldRequests
from service.gateway.http_server.limits import Limits
from service.gateway.http_server.server import HttpServer
from service.gateway.key_set import KeySource
from service.gateway.live_config import LiveConfig
from service.gateway.local_scheduler import LocalScheduler
from service.gateway.metrics import Metrics
from service.gateway.origins import OriginPolicy
from service.gateway.process_limits import connection_limit, raised_process_limits
from service.gateway.router import ModelRouter
from service.registry.models import Adapter, ModelSpec, Registry
from service.settings import Settings

if TYPE_CHECKING:
    from service.gateway.spans import Tracing


def create_local_app(
    registry: Registry,
    default: ModelSpec,
    scheduler: LocalScheduler,
    clients: ClientRegistry,
    metrics: Metrics,
    *,
    settings: Settings,
    source: KeySource | None = None,
    load_models: Callable[[], Registry] | None = None,
    on_models: Callable[[Registry], None] = lambda _: None,
    tracing: Tracing | None = None,
    extension: Extension | None = None,
    record_adapter: Callable[[str, Adapter], None] | None = None,
) -> Gateway:
    """Return the gateway to this machine's engines.

    Args:
        registry: The models that it serves.
        default: The model of requests for `llm`.
        scheduler: Starts and evicts the engines.
        clients: The API clients and their limits.
        metrics: Counts and logs requests.
        settings: How long a request is held while its pool wakes, and which origins and hosts are allowed.
        source: Where keys and limits come from while it serves; None: they stay as they are.
        load_models: Reads the models again.
        on_models: Called with those that are used from now on.
        tracing: Makes spans of requests; None: nothing does.
        extension: Files and batches; None: there are none.
        record_adapter: Keeps an adapter that was loaded for a model, by its key.
    """
    router = ModelRouter(registry, default.key, scheduler.pool)
    origins = OriginPolicy.from_settings(settings)

    def take(models: Registry) -> None:
        on_models(models)
        scheduler.replace(models)

    connect = metrics.ledger.connect if metrics.ledger else None
    config = None
    if source:
        config = LiveConfig(
            source,
            clients,
            router,
            load_models=load_models,
            prepare_models=scheduler.prepare,
            on_models=take,
            record_adapter=record_adapter,
            connect=connect,
        )
    return create_app(
        router,
        clients,
        metrics,
        hold_s=settings.hold_s,
        max_n=settings.max_n,
        held=HeldRequests.from_settings(settings),
        origins=origins,
        config=config,
        tracing=tracing,
        extension=extension,
    )


class LocalServer:
    """Serves until a signal arrives or `end` is called.

    Args:
        app: The gateway.
        addresses: Bound sockets, which do not listen yet.
        scheduler: The engines behind the gateway.
        keep_alive_s: How long an idle connection stays open.
        on_open: Called when the gateway accepts requests.
        on_drain: Called when the drain begins.
        on_late_request: Called where a request crosses the close of an idle connection, and is lost.
    """

    def __init__(
        self,
        app: Gateway,
        addresses: Sequence[socket.socket],
        scheduler: LocalScheduler,
        *,
        keep_alive_s: float,
        on_open: Callable[[], None],
        on_drain: Callable[[], None],
        on_late_request: Callable[[], None] = lambda: None,
    ) -> None:
        self._app, self._addresses, self._scheduler = app, addresses, scheduler
        self._keep_alive_s, self._on_open, self._on_drain = keep_alive_s, on_open, on_drain
        self._on_late_request = on_late_request
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None
        self._must_end = self._was_requested = False
        self._server: HttpServer | None = None
        self._stopping = asyncio.Event()

    def run(self, signals: tuple[signal.Signals, ...]) -> None:
        """Serve; the first of the signals drains, a second one, less SIGHUP, kills everything at once. Blocks.

        Main thread only.
        """
        used = {*signals, signal.SIGHUP}
        before = {number: signal.getsignal(number) for number in used}  # closing a loop sets the default ones
        try:
            with raised_process_limits(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve(signals))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def end(self) -> None:
        """End at once, from any thread: the engine that the service was started for has died."""
        self._must_end = True
        if self._loop:
            with contextlib.suppress(RuntimeError):  # the loop is closed: serving has ended
                self._loop.call_soon_threadsafe(self._end, 0.0)

    async def _serve(self, signals: tuple[signal.Signals, ...]) -> None:
        self._loop = loop = asyncio.get_running_loop()
        for number in signals:
            loop.add_signal_handler(number, self._on_signal, number)
        self._scheduler.begin()
        for address in self._addresses:  # connections in TIME_WAIT would keep the port otherwise
            address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        most = connection_limit()
        limits = Limits(connections=most, address_connections=most // 2, keep_alive_s=self._keep_alive_s)
        self._server = HttpServer(self._app, limits, self._on_late_request)
        if self._must_end:
            self._end(0.0)
        try:
            self._reload_on_hang_up(loop)
            await self._server.start(self._addresses)
            if not self._ending:
                self._on_open()
            await self._stopping.wait()
            await self._server.stop(LOCAL_SHUTDOWN.gateway_s)
        finally:
            await (self._ending or self._scheduler.close(0))

    def _reload_on_hang_up(self, loop: asyncio.AbstractEventLoop) -> None:
        """Make SIGHUP reload where it is no end, as under nohup."""
        config = self._app.config
        if config and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            loop.add_signal_handler(signal.SIGHUP, config.reload_soon)

    def _on_signal(self, number: signal.Signals) -> None:
        is_request = number is not signal.SIGHUP  # a terminal that closes may send several: nobody is impatient
        if not self._ending:
            self._end(None)
            self._on_drain()
        elif is_request and self._was_requested:
            self._scheduler.kill()
            if self._server:
                self._server.abort()
        self._was_requested |= is_request

    def _end(self, grace_s: float | None) -> None:
        if not self._ending:
            self._ending = asyncio.ensure_future(self._scheduler.close(grace_s))
            self._ending.add_done_callback(lambda _: self._stopping.set())  # until then new requests get 503
