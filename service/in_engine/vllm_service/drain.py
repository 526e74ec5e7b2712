"""The end of serving: new requests are refused, those in flight get their grace, and what is left ends with a word.

The parent says `drain` before it terminates the engine. vLLM's own shutdown answers new requests with 500 and cuts
streams without a word; here every client learns what happened and that asking again is right.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

RETRY_AFTER_S = 5  # by then another replica takes requests, or queues them
TEXT = "This replica is shutting down. Send the request again: another one takes it."


class Drain:
    """Which requests are in flight, and whether the end has begun. Lives in one event loop."""

    def __init__(self) -> None:
        self.begun = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._none_left = asyncio.Event()
        self._cut: set[asyncio.Task[Any]] = set()

    async def run(self, path: str, send: Send, app: Callable[[Send], Awaitable[None]]) -> None:
        """Run a request as one in flight. One that outlives the grace ends in the form its protocol has for errors."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in a task
        answer = _Answer(path, send)
        self._tasks.add(task)
        try:
            await app(answer.send)
        except asyncio.CancelledError:
            if task not in self._cut:
                raise
            task.uncancel()
            await answer.end()
        finally:
            self._tasks.discard(task)
            self._cut.discard(task)
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
        self._cut = set(self._tasks)
        count = len(self._cut)
        for task in self._cut:
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
    """Knows how far a response has come, and so how it can still be ended."""

    def __init__(self, path: str, send: Send) -> None:
        self._path, self._send = path, send
        self._began = self._streams = self._over = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._began = True
            self._streams = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._over = True
        await self._send(message)

    async def end(self) -> None:
        if self._over:
            return
        if not self._began:
            await refuse(self._send)
        elif self._streams:  # vLLM sends whole events: this one stands between two
            await self._send({"type": "http.response.body", "body": last_event(self._path)})
        # anything else was cut in the middle: no end is sent, and the server closes the connection


def last_event(path: str) -> bytes:
    """Return what ends a stream of `path` as an error."""
    error = {"message": TEXT, "type": "service_unavailable", "param": None, "code": 503}
    if path.startswith("/v1/messages"):
        anthropic = {"type": "error", "error": {"type": "overloaded_error", "message": TEXT}}
        return b"event: error\ndata: " + json.dumps(anthropic).encode() + b"\n\n"
    if path.startswith("/v1/responses"):
        event = {"type": "error", "code": "service_unavailable", "message": TEXT, "param": None}
        return b"event: error\ndata: " + json.dumps(event).encode() + b"\n\n"
    return b"data: " + json.dumps({"error": error}).encode() + b"\n\ndata: [DONE]\n\n"


async def refuse(send: Send) -> None:
    """Answer 503 with the time after which to ask again."""
    body = {"message": TEXT, "type": "service_unavailable", "param": None, "code": "shutting_down"}
    encoded = json.dumps({"error": body}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(encoded)).encode()),
        (b"retry-after", str(RETRY_AFTER_S).encode()),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": encoded})


_current: Drain | None = None


def current() -> Drain:
    """Return the drain of this process's API server."""
    global _current  # noqa: PLW0603 - one server, one end
    if _current is None:
        _current = Drain()
    return _current
