"""Whose request it is, and turns among clients at what is done for one at a time."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager

client: contextvars.ContextVar[str] = contextvars.ContextVar("client", default="")  # set by the guard


class Shares:
    """The time that clients have taken, by which the next of those that wait is found: who has taken the least.

    This is start-time fair queueing (Goyal, Vin and Cheng, 1996): a client's time counts from that of the work begun
    last when it came, so that it neither saves up time nor pays for ever.
    """

    def __init__(self) -> None:
        self._taken_s: dict[str, float] = {}  # of each client that waits, or has taken more than the work begun last
        self._now_s = 0.0  # what the client of the work begun last had taken before it

    def come(self, name: str) -> None:
        """Note that a client waits."""
        self._taken_s[name] = max(self._taken_s.get(name, 0.0), self._now_s)

    def next(self, waiting: Collection[str]) -> str:
        """Return the client whose work begins now."""
        name = min(waiting, key=self._taken_s.__getitem__)
        self._now_s = self._taken_s[name]
        return name

    def charge(self, name: str, seconds: float, waiting: Collection[str]) -> None:
        """Note what a client's work took, and forget clients of which nothing matters any more."""
        self.come(name)
        self._taken_s[name] += seconds
        self._taken_s = {
            other: taken for other, taken in self._taken_s.items() if taken > self._now_s or other in waiting
        }

    def reset(self) -> None:
        """Forget all clients; none waits."""
        self._taken_s.clear()
        self._now_s = 0.0

    def __len__(self) -> int:
        """Return how many clients it knows."""
        return len(self._taken_s)


class Turns:
    """One turn at a time, given by `Shares`. Belongs to one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._shares = Shares()
        self._is_taken = False

    def waiting(self, name: str) -> int:
        """Return how many of a client's wait."""
        return len(self._waiting.get(name, ()))

    @asynccontextmanager
    async def take(self, name: str) -> AsyncIterator[None]:
        """Wait for a turn, and have it until the end of the block; its time is charged to the client."""
        await self._wait(name)
        begun = self._clock()
        try:
            yield
        finally:
            self._end(name, self._clock() - begun)

    async def _wait(self, name: str) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._shares.come(name)
        self._waiting.setdefault(name, deque()).append(turn)
        self._give_soon()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._remove(name, turn)
            else:
                self._end(name, 0)
            raise

    def _end(self, name: str, seconds: float) -> None:
        self._shares.charge(name, seconds, self._waiting)
        self._is_taken = False
        self._give_soon()

    def _give_soon(self) -> None:
        """Give the turn once the client that has just ended its own may wait again, for its next step."""
        asyncio.get_running_loop().call_soon(self._give)

    def _give(self) -> None:
        if not self._is_taken and not self._waiting:
            self._shares.reset()
        while self._waiting and not self._is_taken:
            name = self._shares.next(self._waiting)
            turn = self._waiting[name][0]
            self._remove(name, turn)
            if not turn.done():  # else it was cancelled just now
                self._is_taken = True
                turn.set_result(None)

    def _remove(self, name: str, turn: asyncio.Future[None]) -> None:
        queue = self._waiting.get(name, deque())
        if turn in queue:
            queue.remove(turn)
        if not queue:
            self._waiting.pop(name, None)
