"""The rate of the gateway's own calls to Modal: health checks, look-ups, polls for answers.

A new workspace has 200 calls and requests a second, its users' requests among them. Source: Modal's documentation.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

PER_S, BURST = 40.0, 40  # a fifth of the limit
CALL_S = 10.0  # how long one call may take: Modal's client has no limit of its own


class CallRate:
    """Lets calls pass one after another, in the order in which they came.

    Args:
        per_s: Calls a second.
        burst: How many may pass at once after a pause.
        clock: Seconds, for tests.
    """

    def __init__(self, per_s: float = PER_S, burst: int = BURST, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s, self._ahead_s, self._clock = 1 / per_s, (burst - 1) / per_s, clock
        self._next_at = 0.0  # when the next call is due at the mean rate

    async def wait(self) -> None:
        """Wait until the next call may be made."""
        if (delay_s := self.reserve()) > 0:
            await asyncio.sleep(delay_s)

    def reserve(self) -> float:
        """Take the next call's place and return in how many seconds it may be made."""
        now = self._clock()
        due, self._next_at = self._next_at, max(self._next_at, now) + self._interval_s
        return max(0.0, due - self._ahead_s - now)
