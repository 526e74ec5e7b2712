"""The search for the concurrency that saturates a pool, against pools of which that is known."""

from __future__ import annotations

import pytest

from service.batch.concurrency import ConcurrencySearch


def settled(places: int, *, most: int = 256, each_s: float = 1.0, ends: int = 3000) -> list[int]:
    """Return the limits over time at a pool which works at so many requests at a time."""
    now = 0.0
    search = ConcurrencySearch(most=most, clock=lambda: now)
    limits = []
    for _ in range(ends):
        now += each_s / min(search.limit, places)
        search.ended(100)
        limits.append(search.limit)
    return limits


@pytest.mark.parametrize("places", [1, 4, 16, 100, 256])
def test_search_finds_the_places_of_a_pool_within_a_factor_of_two(places: int) -> None:
    """The pool is full nearly all of the time, and never far more is in flight."""
    last = settled(places)[-2000:]

    assert sum(limit >= places for limit in last) / len(last) > 0.9
    assert max(last) <= max(8, 4 * places)


def test_search_stays_within_the_most() -> None:
    """Whatever the pool could do."""
    assert max(settled(256, most=10)) == 10


def test_search_goes_on_when_replicas_come() -> None:
    """It tries more from time to time."""
    now, places = 0.0, 8
    search = ConcurrencySearch(clock=lambda: now)
    for end in range(6000):
        places = 8 if end < 2000 else 64
        now += 1 / min(search.limit, places)
        search.ended(100)

    assert search.limit >= 64


def test_time_in_which_nothing_was_sent_is_no_rate() -> None:
    """A pool that woke again is not taken for a slow one."""
    now = 0.0
    search = ConcurrencySearch(clock=lambda: now)
    for end in range(400):
        now += 1 / search.limit
        search.ended(100)
        if end == 20:
            now += 600
            search.restart()

    assert search.limit >= 64
