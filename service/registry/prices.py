"""What GPUs cost: Modal's prices where they are known, else those of the dated table; and the surcharge of a region.

Modal names a price `gpu_hour_cost_<gpu>`, in lower case with `_` for `-`; a GPU without one has the table's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from service.registry.gpus import PRICES_DATE, PRICES_SOURCE, Gpu
from service.registry.tiers import Tier

# Source: modal.com/docs/guide/region-selection, read on 2026-11-29: `us` is broad, `us-west` is narrow.
_BROAD_REGION, _NARROW_REGION = 1.5, 1.75


@dataclass(frozen=True)
class Prices:
    """Prices of one moment.

    Attributes:
        per_hour: Modal's prices by their names; none where Modal did not tell them.
    """

    per_hour: Mapping[str, float] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Where they are from, for people."""
        return "Modal's current prices" if self.per_hour else f"{PRICES_SOURCE}, {PRICES_DATE}"

    def of(self, tier: Tier | None, region: str | None = None) -> float:
        """Return what a replica's GPUs cost in an hour in a region; nothing where it has none."""
        return self._of_gpu(tier.gpu) * tier.n_gpu * surcharge(region) if tier else 0.0

    def _of_gpu(self, gpu: Gpu) -> float:
        name = gpu.name.rstrip("!+").lower().replace("-", "_")
        return self.per_hour.get(f"gpu_hour_cost_{name}", gpu.dollars_per_hour)


def surcharge(region: str | None) -> float:
    """Return what a choice of region multiplies prices by."""
    if region is None:
        return 1.0
    return _NARROW_REGION if "-" in region else _BROAD_REGION
