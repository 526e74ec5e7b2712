"""Which idle engines must end so that another one fits."""

from __future__ import annotations

import pytest

from service.gateway.eviction import RunningEngine, eviction_for

IDLE_A, IDLE_B, BUSY_C = RunningEngine("a", 4, True), RunningEngine("b", 4, True), RunningEngine("c", 4, False)


@pytest.mark.parametrize(
    ("needed", "free", "running", "evicted"),
    [
        (4, 4, [IDLE_A], []),
        (4, 0, [IDLE_A, IDLE_B], ["a"]),
        (6, 0, [IDLE_A, IDLE_B], ["a", "b"]),
        (4, 0, [BUSY_C, IDLE_A], ["a"]),
        (4, 0, [BUSY_C], None),
        (8, 0, [IDLE_A, BUSY_C], None),
        (99, 0, [], []),
        (99, 0, [IDLE_A, IDLE_B], ["a", "b"]),
        (99, 0, [IDLE_A, BUSY_C], None),
    ],
    ids=["fits", "first", "both", "not the busy one", "busy", "not enough", "alone", "too large", "too large and busy"],
)
def test_eviction_takes_the_least_recently_used_idle_engines_that_suffice(
    needed: int, free: int, running: list[RunningEngine], evicted: list[str] | None
) -> None:
    """No engine in use ends, none ends if that does not suffice, and a model that is alone may always start."""
    assert eviction_for(needed, free, running) == evicted
