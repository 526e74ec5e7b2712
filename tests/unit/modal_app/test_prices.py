"""The prices by which the gateway counts: Modal's, else those that a deploy left, else the table's."""

from __future__ import annotations

import asyncio

import pytest

from service.gateway.catalog import describe
from service.modal_app import prices, spend_store
from service.modal_app.gateway_deployment import GatewayDeployment
from service.modal_app.prices import GatewayPrices
from service.modal_app.spend_limits import limited_tiers
from service.registry.gpus import GPUS
from service.registry.models import Registry
from service.registry.prices import Prices
from service.registry.tiers import Tier
from service.settings import Settings

L4 = Tier(GPUS["L4"])


class Account:
    """What Modal tells: prices, None where it refuses; and what a deploy left."""

    def __init__(self) -> None:
        self.live: float | None = None
        self.left: float | None = None
        self.reads = 0

    async def read(self) -> Prices | None:
        """Return the live prices."""
        self.reads += 1
        return None if self.live is None else Prices({"gpu_hour_cost_l4": self.live})

    async def load(self, _app: str) -> dict[str, float] | None:
        """Return those of a deploy."""
        return None if self.left is None else {"gpu_hour_cost_l4": self.left}


def test_gateway_reads_prices_again_once_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no daily limit counts, too."""
    account, now, rounds = Account(), [0.0], 3
    account.live = 1.1
    monkeypatch.setattr(prices, "_read", account.read)
    found = GatewayPrices("vllm-gateway", None, lambda: now[0])

    async def sleep(seconds: float) -> None:
        now[0] += seconds
        if account.reads == rounds:
            raise asyncio.CancelledError

    monkeypatch.setattr(prices.asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(found.watch())
    assert (found.of(L4), now[0]) == (1.1, 3600.0 * rounds)


def test_gateway_prices_are_modals_else_the_last_deploys_else_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for once an hour; what nobody tells any more stays; a region costs more."""
    account, now = Account(), [0.0]
    monkeypatch.setattr(prices, "_read", account.read)
    monkeypatch.setattr(spend_store, "load_prices", account.load)
    found = GatewayPrices("vllm-gateway", "us", lambda: now[0])

    def price(after_s: float) -> float:
        now[0] += after_s
        asyncio.run(found.refresh())
        return found.of(L4) / 1.5

    assert price(0) == pytest.approx(GPUS["L4"].dollars_per_hour)
    account.left = 0.9
    assert price(3599) == pytest.approx(GPUS["L4"].dollars_per_hour)
    assert price(1) == pytest.approx(0.9)
    account.live = 1.1
    assert price(3600) == pytest.approx(1.1)
    account.live = account.left = None
    assert price(3600) == pytest.approx(1.1)
    assert account.reads == 4


@pytest.mark.parametrize("limit", [None, 100])
def test_catalogue_has_the_price_of_the_moment_with_its_region(limit: int | None) -> None:
    """Whether a day's dollars are limited or not."""
    settings = Settings(region="us-west", max_dollars_per_day=limit)
    registry = Registry.load()
    tiers, guard, _ = limited_tiers(GatewayDeployment(settings, registry), {})
    assert bool(guard) == bool(limit)
    pool = tiers.pool(registry.specs["qwen3-8b"], GPUS["H100"])
    assert describe(pool, "cold")["dollars_per_hour"] == pytest.approx(3.95 * 1.75, abs=1e-4)
