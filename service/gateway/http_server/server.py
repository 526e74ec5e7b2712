"""An HTTP/1.1 server for one ASGI application: sockets, the application's lifespan, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Sequence
from email.utils import formatdate
from typing import Any

from service.gateway.http_server.connection import Connection
from service.gateway.http_server.exchange import App
from service.gateway.http_server.limits import Limits, Shared
from service.in_engine.vllm_service.api_error import Message

_BACKLOG = 2048
_SWEEP_S = 1.0  # between two looks at the deadlines: one timer for all connections


class HttpServer:
    """Serves from `start` to `stop`.

    Args:
        app: An ASGI application with a lifespan.
        limits: What each client may take.
        on_late_request: Called where a request crosses the close of an idle connection, and is lost.
    """

    def __init__(
        self, app: App, limits: Limits | None = None, on_late_request: Callable[[], None] = lambda: None
    ) -> None:
        self._shared = Shared(app, limits or Limits(), on_late_request)
        self._lifespan = _Lifespan(app, self._shared.state)
        self._servers: list[asyncio.Server] = []
        self._sweep: asyncio.TimerHandle | None = None

    async def start(self, sockets: Sequence[socket.socket]) -> None:
        """Start the application, then listen on these bound sockets.

        Raises:
            RuntimeError: The application did not start.
        """
        await self._lifespan.begin()
        loop = asyncio.get_running_loop()
        self._look_at_time(loop.time())
        for bound in sockets:
            self._servers.append(
                await loop.create_server(lambda: Connection(self._shared), sock=bound, backlog=_BACKLOG)
            )

    async def stop(self, grace_s: float) -> None:
        """Take no more requests, let those in progress end within `grace_s`, cancel the others; end the application."""
        shared = self._shared
        shared.stopping = True
        for server in self._servers:
            server.close()
        for connection in [*shared.connections]:
            connection.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await shared.empty.wait()
        self.abort()
        await asyncio.gather(*shared.tasks, return_exceptions=True)
        if self._sweep:
            self._sweep.cancel()
        await self._lifespan.end()

    def abort(self) -> None:
        """Cancel the requests in progress and close all connections; `stop` need not wait any longer."""
        for task in self._shared.tasks:
            task.cancel()
        for connection in [*self._shared.connections]:
            connection.abort()

    def _look_at_time(self, due: float) -> None:
        loop = asyncio.get_running_loop()
        self._shared.date = b"date: " + formatdate(time.time(), usegmt=True).encode()
        now = loop.time()
        for connection in [*self._shared.connections]:
            connection.check_deadlines(now)
        self._sweep = loop.call_at(due + _SWEEP_S, self._look_at_time, due + _SWEEP_S)


class _Lifespan:
    """The application's lifespan (ASGI): what it puts into its state reaches each request.

    Args:
        app: The application.
        state: Where it puts it.
    """

    def __init__(self, app: App, state: dict[str, Any]) -> None:
        self._app, self._state = app, state
        self._to_app: asyncio.Queue[Message] = asyncio.Queue()
        self._from_app: asyncio.Queue[Message] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Start the application.

        Raises:
            RuntimeError: It failed.
        """
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self._state}
        self._task = asyncio.ensure_future(self._app(scope, self._to_app.get, self._from_app.put))
        await self._exchange("startup")

    async def end(self) -> None:
        """End the application.

        Raises:
            RuntimeError: It failed.
        """
        if self._task and not self._task.done():
            await self._exchange("shutdown")
            await self._task

    async def _exchange(self, step: str) -> None:
        assert self._task  # noqa: S101 - `begin` starts it
        self._to_app.put_nowait({"type": f"lifespan.{step}"})
        answer = asyncio.ensure_future(self._from_app.get())
        await asyncio.wait((answer, self._task), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            answer.cancel()
            self._task.result()
            raise RuntimeError(f"The application's lifespan ended at its {step}.")
        if (message := answer.result())["type"] != f"lifespan.{step}.complete":
            raise RuntimeError(f"The application's {step} failed: {message.get('message', message['type'])}")
