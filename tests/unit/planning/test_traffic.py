"""Scale to zero: the closed form against a simulation of every request, and its limits."""

from __future__ import annotations

import random

import pytest

from service.planning.traffic import Replica, Traffic, scale_to_zero

REQUESTS = 200_000


def simulated(traffic: Traffic, window_s: float) -> tuple[float, float, float]:
    """Return the share of the time that is billed, the share of cold requests, and the mean wait."""
    chance = random.Random(1)  # noqa: S311 - a simulation, the same each time
    now, ready_at, down_at = 0.0, 0.0, 0.0  # the replica is up or boots until `down_at`
    billed = waited = 0.0
    cold = 0
    for _ in range(REQUESTS):
        now += chance.expovariate(traffic.requests_per_hour / 3600)
        if now >= down_at:
            billed_from, ready_at = now, now + traffic.boot_s
        else:
            billed_from = down_at
        begin = max(now, ready_at)
        waited += begin - now
        cold += begin > now
        down_at = max(down_at, begin + traffic.request_s + window_s)
        billed += down_at - billed_from
    return billed / now, cold / REQUESTS, waited / REQUESTS


@pytest.mark.parametrize("window_s", [30, 300, 900])
@pytest.mark.parametrize("requests_per_hour", [2, 10, 40])
def test_closed_form_is_what_a_simulation_gives(requests_per_hour: float, window_s: float) -> None:
    """200,000 requests at random times, each followed alone."""
    traffic = Traffic(requests_per_hour, 10.0, 120.0)
    found = scale_to_zero(traffic, window_s)
    billed, cold, wait = simulated(traffic, window_s)
    assert found.up_share == pytest.approx(billed, rel=0.02)
    assert found.cold_share == pytest.approx(cold, rel=0.04, abs=0.0005)
    assert found.mean_wait_s == pytest.approx(wait, rel=0.04, abs=0.05)


def test_no_traffic_costs_nothing_and_much_is_never_cold() -> None:
    """The limits: no request at all, and one every few milliseconds."""
    none, much = (scale_to_zero(Traffic(rate, 10.0, 120.0), 900) for rate in (0.0, 1e6))
    assert (none.hours_per_day, none.boots_per_day) == (0.0, 0.0)
    assert (much.hours_per_day, much.cold_share, much.mean_wait_s) == (24.0, 0.0, 0.0)


def test_longer_window_costs_more_and_waits_less() -> None:
    """Whatever the traffic."""
    found = [scale_to_zero(Traffic(10.0, 10.0, 120.0), window) for window in (30, 60, 300, 900, 3600)]
    assert found == sorted(found, key=lambda one: one.up_share) == sorted(found, key=lambda one: -one.cold_share)
    assert found == sorted(found, key=lambda one: -one.mean_wait_s)


def test_tokens_cost_less_with_load_until_replicas_are_full() -> None:
    """Then there are as many replicas as it takes."""
    replica, tokens = Replica(4.0, 64, 900), 1000
    costs = [replica.dollars_per_million(Traffic(rate, 10.0, 120.0), tokens) for rate in (1, 10, 100, 1000, 23_040)]
    assert costs == sorted(costs, reverse=True)
    assert replica.dollars_per_day(Traffic(23_041, 10.0, 120.0)) == 2 * 24 * 4.0
    assert costs[-1] == pytest.approx(4.0 / 23_040 / tokens * 1e6)


def test_break_even_is_where_the_prices_meet() -> None:
    """Below it a request costs more than at the market; dear markets and cheap ones have none."""
    replica, traffic = Replica(4.0, 64, 900), Traffic(10.0, 10.0, 120.0)
    rate = replica.break_even(traffic, 1000, 2.0)
    assert rate
    assert replica.dollars_per_million(Traffic(rate, 10.0, 120.0), 1000) == pytest.approx(2.0, rel=0.01)
    assert replica.break_even(traffic, 1000, 0.01) is None
    assert replica.break_even(traffic, 1000, 1e9) == 0.0


def test_second_replica_pays_from_where_two_are_used_enough() -> None:
    """It doubles the cost at once, which loses again, unless one pays from less than half of what it carries."""
    replica, traffic, tokens = Replica(4.0, 64, 900), Traffic(10.0, 10.0, 120.0), 1000
    carried = replica.capacity(traffic)
    market = 1.5 * 4.0 / carried / tokens * 1e6
    rate = replica.second_break_even(traffic, tokens, market)
    assert carried < rate < 2 * carried
    losing, paying = (
        replica.dollars_per_million(Traffic(load, 10.0, 120.0), tokens) for load in (rate * 0.999, rate * 1.001)
    )
    assert paying < market < losing
    assert replica.second_break_even(traffic, tokens, 2 * market) == carried
