"""The drain before an engine ends: new requests get 503, running ones get a grace period, the rest end with an error.

The parent sends the command `drain` before it terminates the engine. vLLM's own shutdown answers new requests with 500
and breaks streams off without an event; here every client learns what happened and that it should retry.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from vllm_service import http_contract
from vllm_service.http_contract import Protocol

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

RETRY_AFTER_S = 5  # by then another replica takes requests, or queues them
TEXT = "This replica is shutting down. Send the request again: another one takes it."
# The fields of a stream's last event.
_STREAM_ERRORS: dict[Protocol, dict[str, object]] = {
    Protocol.OPENAI: http_contract.error_fields(TEXT, "service_unavailable", 503),
    Protocol.RESPONSES: {"code": "service_unavailable", "message": TEXT, "param": None},
    Protocol.ANTHROPIC: {"type": "overloaded_error", "message": TEXT},
}


class Drain:
    """The requests in flight, and whether the drain has begun. Belongs to one event loop."""

    def __init__(self) -> None:
        self.begun = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._none_left = asyncio.Event()
        self._cancelled: set[asyncio.Task[Any]] = set()

    async def run(self, path: str, send: Send, app: Callable[[Send], Awaitable[None]]) -> None:
        """Run a request as one in flight. One that outlasts the grace period ends with an error of its protocol."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in a task
        answer = _Answer(path, send)
        self._tasks.add(task)
        try:
            await app(answer.send)
        except asyncio.CancelledError:
            if task not in self._cancelled:
                raise
            task.uncancel()
            await answer.end()
        finally:
            self._tasks.discard(task)
            self._cancelled.discard(task)
            if not self._tasks:
                self._none_left.set()

    async def drain(self, grace_s: float, cancel_s: float) -> int:
        """Refuse new requests, wait for those in flight, cancel what is left, and return how many were cancelled.

        Args:
            grace_s: How long requests in flight may go on.
            cancel_s: How long the cancelled ones may take to end.
        """
        self.begun = True
        await self._wait(grace_s)
        self._cancelled = set(self._tasks)
        count = len(self._cancelled)
        for task in self._cancelled:
            task.cancel()
        await self._wait(cancel_s)
        return count

    async def _wait(self, seconds: float) -> None:
        if self._tasks:
            self._none_left.clear()
            try:
                await asyncio.wait_for(self._none_left.wait(), seconds)
            except TimeoutError:
                return


class _Answer:
    """Tracks how much of a response was sent, and so how it can still end with an error."""

    def __init__(self, path: str, send: Send) -> None:
        self._path, self._send = path, send
        self._started = self._is_stream = self._finished = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            self._is_stream = (
                dict(message["headers"]).get(b"content-type", b"").startswith(http_contract.EVENT_STREAM.encode())
            )
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._finished = True
        await self._send(message)

    async def end(self) -> None:
        if self._finished:
            return
        if not self._started:
            await send_shutdown_error(self._path, self._send)
        elif self._is_stream:  # vLLM sends whole events, so this one does not interrupt another
            await self._send({"type": "http.response.body", "body": stream_error_event(self._path)})
        # anything else broke off in the middle: no end is sent, and the server closes the connection


def stream_error_event(path: str) -> bytes:
    """Return the error event that ends a stream of `path`."""
    return http_contract.error_event(path, _STREAM_ERRORS[http_contract.protocol_of(path)])


async def send_shutdown_error(path: str, send: Send) -> None:
    """Answer 503 `shutting_down` with the time after which to retry."""
    body = http_contract.error_body(path, http_contract.error_fields(TEXT, "service_unavailable", "shutting_down"))
    headers = [
        (b"content-type", http_contract.JSON.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", str(RETRY_AFTER_S).encode()),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})


_current: Drain | None = None


def current() -> Drain:
    """Return the drain of this process's API server."""
    global _current  # noqa: PLW0603 - one API server a process, one drain
    if _current is None:
        _current = Drain()
    return _current
