"""The shutdown budget: its steps fit into what the platform gives."""

from __future__ import annotations

import dataclasses

import pytest

from service.engine.shutdown import LOCAL_SHUTDOWN, MODAL_SHUTDOWN, ShutdownBudget

MODAL_LIMIT_S, LOCAL_LIMIT_S = 30, 16


@pytest.mark.parametrize(("budget", "limit_s"), [(MODAL_SHUTDOWN, MODAL_LIMIT_S), (LOCAL_SHUTDOWN, LOCAL_LIMIT_S)])
def test_shutdown_budget_takes_less_than_the_limit(budget: ShutdownBudget, limit_s: float) -> None:
    """Every duration that belongs to the end counts; vLLM's own is part of the time to terminate."""
    outside = {"limit_s", "vllm_s"}
    steps = [getattr(budget, field.name) for field in dataclasses.fields(budget) if field.name not in outside]

    assert budget.limit_s == limit_s
    assert sum(steps) == pytest.approx(budget.total_s)
    assert budget.total_s < limit_s
    assert budget.vllm_s < budget.terminate_s


@pytest.mark.parametrize("change", [{"drain_s": 25.0}, {"kill_s": 10.5}, {"limit_s": 24.5}, {"vllm_s": 3}])
def test_shutdown_budget_over_the_limit_is_refused(change: dict[str, float]) -> None:
    """A step that is lengthened takes its time from another."""
    with pytest.raises(ValueError, match=r"limit is|part of terminate_s"):
        dataclasses.replace(MODAL_SHUTDOWN, **change)
