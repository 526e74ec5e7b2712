"""The drain before an engine ends: new requests get 503, running ones get a grace period, the rest end with an error.

The parent sends the command `drain` before it terminates the engine. vLLM's own shutdown answers new requests with 500
and breaks streams off without an event; here every client learns what happened and that it should retry.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from vllm_service.answer import Answer
from vllm_service.api_error import APIError

RETRY_AFTER_S = 5  # by then another replica takes requests, or queues them
TEXT = "This replica is shutting down. Send the request again: another one takes it."


class Drain:
    """The requests in flight, and whether the drain has begun. Belongs to one event loop."""

    def __init__(self) -> None:
        self.begun = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._none_left = asyncio.Event()
        self._cancelled: set[asyncio.Task[Any]] = set()

    async def run(self, answer: Answer, app: Callable[[], Awaitable[None]]) -> None:
        """Run a request as one in flight. One that outlasts the grace period ends with an error of its protocol.

        Raises:
            APIError: 503: the drain has begun.
        """
        if self.begun:
            raise shutting_down()
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in a task
        self._tasks.add(task)
        try:
            await app()
        except asyncio.CancelledError:
            if task not in self._cancelled:
                raise
            task.uncancel()
            await answer.fail(shutting_down())  # what broke off in the middle gets no end: the server closes it
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


def shutting_down() -> APIError:
    """Return the error of a request that this replica no longer answers."""
    return APIError(503, TEXT, code="shutting_down", retry_after_s=RETRY_AFTER_S)


_current: Drain | None = None


def current() -> Drain:
    """Return the drain of this process's API server."""
    global _current  # noqa: PLW0603 - one API server a process, one drain
    if _current is None:
        _current = Drain()
    return _current
