"""What a request costs, and what its caller owes."""

from __future__ import annotations

import pytest

from service.in_engine.vllm_service.usage_report import EngineUsage
from service.registry.entries import TokenPrices
from service.registry.models import Registry
from service.usage import money

USAGE = EngineUsage(tokens_in=1_000_000, tokens_cached=400_000, tokens_out=500_000, share_s=36.0)


def test_share_of_a_replica_costs_its_part_of_an_hour() -> None:
    """36 s of 4 dollars an hour."""
    assert money.cost(USAGE, 4.0) == pytest.approx(0.04)
    assert money.dollars(USAGE, None, 0.04) == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("cached", "owed"), [(0.5, 0.6 * 1 + 0.4 * 0.5 + 0.5 * 4), (None, 1 + 0.5 * 4), (0.0, 0.6 + 2)]
)
def test_price_of_tokens_replaces_the_share(cached: float | None, owed: float) -> None:
    """Cached tokens have a price of their own, or that of others."""
    prices = TokenPrices(input=1.0, cached=cached, output=4.0)

    assert money.dollars(USAGE, prices, 0.04) == pytest.approx(owed)


def test_request_whose_engine_told_nothing_costs_its_caller_nothing() -> None:
    """The replica died with it."""
    assert money.cost(None, 4.0) is None
    assert money.dollars(None, TokenPrices(input=1, output=1), None) is None
    assert money.cost(USAGE, None) is None


def test_aborted_request_is_its_keys_and_no_second_request() -> None:
    """The gateway's own record of it counts the request."""
    fields = {
        "client": "team%20a",
        "tokens_in": 3,
        "tokens_cached": 1,
        "tokens_out": 9,
        "share_s": 1.8,
        "replica": "r1",
    }

    found = money.aborted_request(fields, Registry.load().specs["tiny"], dollars_per_hour=2.0)

    assert (found.key, found.model, found.replica) == ("team a", "tiny", "r1")
    assert (found.tokens_in, found.tokens_cached, found.tokens_out) == (3, 1, 9)
    assert found.cost == found.dollars == pytest.approx(0.001)
    assert not found.is_request
