"""Finds how many requests at a time saturate a pool: the number doubles as long as that makes more tokens a second."""

from __future__ import annotations

import time
from collections.abc import Callable

MOST = 256  # vLLM's own default of sequences at a time on a GPU of 80 GB
_WORTH = 1.05  # a step up stays where it brings this factor
_ROUNDS = 2  # ends for each request in flight, from which a rate is taken
_LEAST_S = 0.5  # and for how long at least
_STEADY = 8  # rates until the next step up is tried: other clients may have left, or replicas have come


class ConcurrencySearch:
    """Told of each end, it says how many requests may be in flight.

    Args:
        first: Where it begins.
        most: Where it ends.
        clock: Seconds that never run backwards.

    Attributes:
        limit: Requests that may be in flight now.
    """

    def __init__(self, first: int = 4, most: int = MOST, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self.limit = self._best = min(first, most)
        self._best_rate = 0.0
        self._tries_more, self._steady = True, 0
        self.restart()

    def restart(self) -> None:
        """Take the rate from now on: nothing was sent for a while, which says nothing of the pool."""
        self._since, self._ends, self._work = self._clock(), 0, 0

    def ended(self, tokens: int) -> None:
        """Take an end; `tokens` is what was read and written, 0 where nobody knows."""
        self._ends += 1
        self._work += tokens or 1
        seconds = self._clock() - self._since
        if self._ends >= _ROUNDS * self.limit and seconds >= _LEAST_S:
            self._step(self._work / seconds)
            self.restart()

    def _step(self, rate: float) -> None:
        if self._tries_more and rate < self._best_rate * _WORTH:
            self.limit, self._tries_more, self._steady = self._best, False, 0
            return
        self._best, self._best_rate = self.limit, rate
        self._steady += 1
        self._tries_more = self.limit < self._most and (self._tries_more or self._steady >= _STEADY)
        if self._tries_more:
            self.limit = min(2 * self.limit, self._most)
