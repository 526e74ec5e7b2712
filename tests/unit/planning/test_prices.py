"""Prices of a replica: GPUs, processor, memory, region, and its weights on a volume."""

from __future__ import annotations

import pytest

from service.planning.prices import CORES, MEMORY_GIB, hourly, volume_per_month
from service.registry.gpus import GPUS
from service.registry.prices import Prices
from service.registry.tiers import Tier

H100 = Tier(GPUS["H100"])


def test_hour_has_processor_and_memory_too() -> None:
    """By the dated prices, and by Modal's own where it tells them."""
    dated = hourly(Prices(), H100)
    assert dated.total.low == pytest.approx(3.95 + CORES.low * 0.04716 + MEMORY_GIB.low * 0.007992)
    own = hourly(Prices({"gpu_hour_cost_h100": 3.0, "cpu_hour_cost": 1.0, "mem_gib_hour_cost": 0.5}), H100)
    assert own.total == pytest.approx((3.0 + CORES.low + MEMORY_GIB.low / 2, 3.0 + CORES.high + MEMORY_GIB.high / 2))


@pytest.mark.parametrize(("region", "factor"), [(None, 1.0), ("us", 1.5), ("us-west", 1.75)])
def test_region_multiplies_all_of_it(region: str | None, factor: float) -> None:
    """A narrow one more than a broad one."""
    assert hourly(Prices(), H100, region).total.high == pytest.approx(hourly(Prices(), H100).total.high * factor)


def test_weights_on_a_volume_cost_by_the_month() -> None:
    """Per GiB."""
    assert volume_per_month(10 * 1024**3) == pytest.approx(0.9)
