"""What a replica costs an hour: GPUs, processor, memory, region; and its weights on a volume. Pure.

Modal's current prices name processor and memory `cpu_hour_cost` and `mem_gib_hour_cost`; else the dated figures count.
Sources: processor and memory, modal.com/pricing as transcribed on 2026-09-26; volumes, finops.apis.io's list of Modal's
meters, read on 2026-11-29.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.planning.ranges import Range
from service.registry.prices import Prices, surcharge
from service.registry.tiers import Tier

_CPU_CORE_HOUR = 0.0000131 * 3600  # of a physical core
_MEMORY_GIB_HOUR = 0.00000222 * 3600
_VOLUME_GIB_MONTH = 0.09
VOLUME_FREE_GIB = 1024
# What a replica uses of its host; Modal bills what is used where nothing is reserved. Assumed: none was measured there.
CORES = Range(1.0, 4.0)
MEMORY_GIB = Range(4.0, 16.0)


@dataclass(frozen=True)
class Hourly:
    """Dollars an hour of one replica, before the surcharge of its region."""

    gpus: float
    cpu: Range
    memory: Range
    surcharge: float

    @property
    def total(self) -> Range:
        """All of it, in its region."""
        return (self.cpu + self.memory + Range(self.gpus, self.gpus)).times(self.surcharge)


def hourly(prices: Prices, tier: Tier, region: str | None = None) -> Hourly:
    """Return what a replica costs in an hour."""
    cpu = CORES.times(prices.per_hour.get("cpu_hour_cost", _CPU_CORE_HOUR))
    memory = MEMORY_GIB.times(prices.per_hour.get("mem_gib_hour_cost", _MEMORY_GIB_HOUR))
    return Hourly(prices.of(tier), cpu, memory, surcharge(region))


def volume_per_month(weights_bytes: float) -> float:
    """Return what weights cost on a volume in a month, beyond what is free."""
    return weights_bytes / 1024**3 * _VOLUME_GIB_MONTH
