"""A Modal that answers 429, 408, redirect loops, 502 and resets at random: what clients get, and what the engine."""

from __future__ import annotations

import asyncio

import pytest

from service.gateway import modal_pool, pool, redirects
from tests.gateway import faulty_platform
from tests.unit.gateway.test_error_docs import table


def test_every_client_of_a_faulty_platform_gets_an_answer_or_a_documented_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In bounded time; no request reaches an engine twice, and one health check at a time wakes the pool."""
    monkeypatch.setattr(redirects, "_LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(modal_pool, "_LONGEST_HEALTH_PAUSE_S", 0.05)
    monkeypatch.setattr(pool, "FAILED_FOR_S", 0.1)
    done = asyncio.run(faulty_platform.run(200, seed=7))
    assert sum(done.codes.values()) == 200
    documented = {code for _, _, codes in table().values() for code in codes}
    assert done.codes.keys() - documented == {"answered"}, done.codes
    assert done.codes["answered"] > 80
    assert max(done.seconds) < 15
    assert [number for number, times in done.edge.reached.items() if times > 1] == []
    assert done.edge.most_checks == 1
    assert len({*done.edge.faults.drawn}) == 6
