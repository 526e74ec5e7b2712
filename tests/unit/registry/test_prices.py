"""Prices: Modal's names for GPUs, and the table beside them."""

from __future__ import annotations

import pytest

from service.registry.gpus import GPUS
from service.registry.prices import Prices
from service.registry.tiers import Tier

MODALS = Prices({"gpu_hour_cost_h100": 3.0, "gpu_hour_cost_a100_80gb": 2.0, "gpu_hour_cost_rtx_pro_6000": 1.0})


@pytest.mark.parametrize(
    ("gpu", "n_gpu", "dollars"),
    [("H100", 1, 3.0), ("H100!", 2, 6.0), ("A100-80GB", 1, 2.0), ("RTX-PRO-6000", 8, 8.0), ("L4", 2, 1.6)],
)
def test_price_of_a_tier_is_modals_else_the_tables(gpu: str, n_gpu: int, dollars: float) -> None:
    """Modal has one price for all spellings of a GPU."""
    assert MODALS.of(Tier(GPUS[gpu], n_gpu)) == pytest.approx(dollars)


def test_prices_tell_where_they_are_from() -> None:
    """The table has a date; no tier, no price."""
    assert (MODALS.source, Prices().source) == ("Modal's current prices", "modal.com/pricing, 2026-09-26")
    assert Prices().of(None) == 0.0


@pytest.mark.parametrize(("region", "factor"), [(None, 1.0), ("us", 1.5), ("us-west", 1.75), ("eu-west-1", 1.75)])
def test_region_multiplies_prices(region: str | None, factor: float) -> None:
    """Modal's and the table's: a broad one by 1.5, a narrow one by 1.75."""
    tier = Tier(GPUS["H100"], 2)
    assert MODALS.of(tier, region) == pytest.approx(6.0 * factor)
    assert Prices().of(tier, region) == pytest.approx(2 * GPUS["H100"].dollars_per_hour * factor)
