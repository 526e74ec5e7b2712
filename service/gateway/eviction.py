"""Decides which idle engines of this machine must end so that another one fits. It stops and starts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RunningEngine:
    """An engine that holds some of what another one needs.

    Attributes:
        model: Key of its model.
        holds: Bytes of memory, or GPUs.
        is_idle: No request uses it, so it may end.
    """

    model: str
    holds: int
    is_idle: bool


def eviction_for(needed: int, free: int, running: Sequence[RunningEngine]) -> list[str] | None:
    """Return the models whose engines must end first; None: engines in use are in the way, so none is evicted.

    A model always fits when no other engine is left: if it is too large after all, its own start fails.

    Args:
        needed: What the new engine takes: bytes of memory, or GPUs.
        free: How much of that is free now.
        running: The other engines, least recently used first.
    """
    evicted: list[str] = []
    for engine in running:
        if free >= needed:
            break
        if engine.is_idle:
            evicted.append(engine.model)
            free += engine.holds
    return evicted if free >= needed or len(evicted) == len(running) else None
