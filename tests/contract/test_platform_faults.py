"""A Modal whose proxy answers 429, 408, redirect loops, 502 and resets at random: what clients and engines get."""

from __future__ import annotations

from pathlib import Path

from tests.contract.faulty_requests import faulty_service, run
from tests.fakes.modal import ContainerRuntime
from tests.fakes.modal.faults import Fault, Faults
from tests.unit.gateway.test_error_docs import table

HELD_S, REDIRECTED_S = 120, 10  # at most: SERVICE_HOLD_S; redirects that lead nowhere


def test_requests_under_faults_are_answered_or_refused_and_wake_a_cold_pool_once(
    tmp_path: Path, engine_runtime: ContainerRuntime
) -> None:
    """In bounded time; none reaches an engine twice. `make bench-platform` sends 1,000 over several cold periods."""
    faults = Faults(seed=5, share=0.3)
    with faulty_service(tmp_path, engine_runtime, faults) as (plane, url):
        done = run(plane, url, requests=150, rounds=1, at_once=50, seed=5)
    documented = {code for _, _, codes in table().values() for code in codes}
    assert sum(done.codes.values()) == 150
    assert done.codes.keys() - documented == {"answered"}, done.codes
    assert done.codes["answered"] > 60
    assert max(done.seconds) < HELD_S + REDIRECTED_S
    assert {*faults.drawn} == {*Fault}
    assert done.codes["answered"] <= len(done.reached) <= 150
    assert [number for number, times in done.reached.items() if times > 1] == []
    assert set(done.boots) == {1}, "one container for each cold period"
    assert done.most_queued_cold == 1, "one health check wakes it"
