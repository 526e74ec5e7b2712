"""The door on this machine: a server in the foreground, and how it ends. Imports what takes half a second to import."""

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
from service.gateway.app import Door, gateway
from service.gateway.clients import Keyring
from service.gateway.grammars import Grammars
from service.gateway.local_pool import Machine
from service.gateway.metrics import Metrics
from service.gateway.process_limits import for_many_streams
from service.gateway.router import Directory
from service.in_engine.vllm_service.http_contract import BODY_LIMIT
from service.registry.models import ModelSpec, Registry
from service.settings import Settings

_BACKLOG = 2048
HEAD_LIMIT = 128 * 1024


def door(
    registry: Registry,
    first: ModelSpec,
    machine: Machine,
    keyring: Keyring,
    metrics: Metrics,
    *,
    python: str,
    settings: Settings,
) -> Door:
    """Return the door to this machine's engines.

    Args:
        registry: The models.
        first: What `llm` stands for.
        machine: The engines.
        keyring: Who may come in.
        metrics: Counts requests.
        python: Interpreter of the environment that has the engine's libraries.
        settings: How long requests are held.
    """
    directory = Directory(registry, first.key, machine.pool)
    return gateway(directory, keyring, metrics, hold_s=settings.hold_s, grammars=Grammars(python))


class Listener:
    """Serves until it is told to end.

    Args:
        door: The application.
        address: A socket that is bound, and that nobody listens on yet.
        machine: The engines behind the door.
        on_open: Called when the door takes requests.
        on_drain: Called when the end begins.
    """

    def __init__(
        self,
        door: Door,
        address: socket.socket,
        machine: Machine,
        *,
        on_open: Callable[[], None],
        on_drain: Callable[[], None],
    ) -> None:
        config = uvicorn.Config(
            door,
            http=_Protocol,
            lifespan="on",
            ws="none",
            access_log=False,
            log_config=None,
            log_level="critical",  # the door logs what fails in it; an answer that breaks off is no news here
            proxy_headers=False,
            server_header=False,
            date_header=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=LOCAL_SHUTDOWN.gateway_s,
        )
        self._server = _Server(config, on_open)
        self._address, self._machine, self._on_drain = address, machine, on_drain
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None
        self._given_up = False

    def run(self, signals: tuple[signal.Signals, ...]) -> None:
        """Serve; the first of the signals drains, the second ends everything at once. Blocks; in the main thread."""
        with for_many_streams(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve(signals))

    def end(self) -> None:
        """Give up at once, from any thread: an engine that all depends on is dead."""
        self._given_up = True
        if self._loop:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._end, 0.0)

    async def _serve(self, signals: tuple[signal.Signals, ...]) -> None:
        self._loop = loop = asyncio.get_running_loop()
        for number in signals:
            loop.add_signal_handler(number, self._signalled)
        self._machine.begin()
        self._address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else old connections keep the port
        if self._given_up:
            self._end(0.0)
        try:
            await self._server.serve([self._address])
        finally:
            await (self._ending or self._machine.close(0))
            for number in signals:
                loop.remove_signal_handler(number)

    def _signalled(self) -> None:
        if not self._ending:
            self._on_drain()
            self._end(None)
        else:
            self._server.force_exit = True
            self._machine.kill()

    def _end(self, grace_s: float | None) -> None:
        if not self._ending:
            self._ending = asyncio.ensure_future(self._machine.close(grace_s))
            self._ending.add_done_callback(lambda _: self._close())  # until then it says to whoever comes that it ends

    def _close(self) -> None:
        self._server.should_exit = True


class _Protocol(HttpToolsProtocol):
    """Bounds a request's head, which httptools does not."""

    _head = 0

    def data_received(self, data: bytes) -> None:
        """Close the connection of a head that has no end."""
        self._head += len(data)
        super().data_received(data)
        if self._head > HEAD_LIMIT:
            self.transport.close()

    def on_headers_complete(self) -> None:
        """Stop counting: what follows is the body."""
        self._head = -BODY_LIMIT - HEAD_LIMIT
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Count anew."""
        self._head = 0
        super().on_message_complete()


class _Server(uvicorn.Server):
    """Leaves signals to its owner, and says when it listens."""

    def __init__(self, config: uvicorn.Config, on_open: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_open = on_open

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        if not self.should_exit:
            self._on_open()
