"""GPU tiers: a GPU type and a count make one deployed app. Their names, prices, and whether a model's weights fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.errors import GpuMemoryError
from service.registry.gpus import GPUS, Gpu, check_count

if TYPE_CHECKING:
    from service.registry.models import ModelSpec

# vLLM's default of gpu_memory_utilization; nothing here sets another. Source: vllm/config/cache.py of vLLM 0.32.0.
ENGINE_SHARE = 0.92


@dataclass(frozen=True)
class Tier:
    """A GPU type and how many of them one replica has.

    Raises:
        UnknownGpuError: One container cannot have so many.
    """

    gpu: Gpu
    n_gpu: int = 1

    def __post_init__(self) -> None:
        check_count(self.gpu, self.n_gpu)

    @property
    def app_name(self) -> str:
        """Name of the app that is deployed for it: `vllm-h100`, `vllm-h200x2`."""
        return f"vllm-{self.gpu.slug}" if self.n_gpu == 1 else f"vllm-{self.gpu.slug}x{self.n_gpu}"

    @property
    def request(self) -> str:
        """Modal's `gpu=`: `H100`, `H200:2`."""
        return self.gpu.name if self.n_gpu == 1 else f"{self.gpu.name}:{self.n_gpu}"

    @property
    def label(self) -> str:
        """What people read: `H100`, `2 x H200`."""
        return count_label(self.gpu.name, self.n_gpu)

    @property
    def settings(self) -> str:
        """The settings of a deploy of it: `SERVICE_GPU=H200 SERVICE_N_GPU=2`."""
        return f"SERVICE_GPU={self.gpu.name}" + ("" if self.n_gpu == 1 else f" SERVICE_N_GPU={self.n_gpu}")

    @property
    def dollars_per_hour(self) -> float:
        """Price of one replica's GPUs."""
        return self.gpu.dollars_per_hour * self.n_gpu

    @property
    def engine_gb(self) -> float:
        """What vLLM uses of its memory, in 10^9 bytes.

        A vendor's GB counts as 10^9 bytes here. Cards have up to 7 % more (80 GB are 80 GiB on an H100), which is less
        than the KV cache and activations take.
        """
        return self.gpu.memory_gb * self.n_gpu * ENGINE_SHARE

    def holds(self, spec: ModelSpec) -> bool:
        """Tell whether a model's weights fit; of unknown weights it is assumed."""
        return spec.weights_gb is None or spec.weights_gb < self.engine_gb


def count_label(gpu_name: str, n_gpu: int) -> str:
    """Return what people read of a number of GPUs: `NVIDIA L4`, `2 x NVIDIA H200`."""
    return gpu_name if n_gpu == 1 else f"{n_gpu} x {gpu_name}"


def tier_of(spec: ModelSpec, gpu: Gpu | None = None, n_gpu: int | None = None) -> Tier:
    """Return the tier of a model: GPU and count as given, else its entry's; one GPU if it is not the entry's type."""
    chosen = gpu or spec.tier.gpu
    return Tier(chosen, n_gpu or (spec.n_gpu if chosen == spec.tier.gpu else 1))


def check_weights(spec: ModelSpec, tier: Tier, written: Callable[[Tier], str]) -> None:
    """Refuse a tier whose memory is less than a model's weights; the hint names tiers that fit.

    Args:
        spec: The model.
        tier: Where it is to run.
        written: Returns a tier as the caller writes it: `SERVICE_GPU=H100`, or the name of a model.

    Raises:
        GpuMemoryError: The engine would run out of memory while it loads the weights.
    """
    if tier.holds(spec):
        return
    fitting = [other for gpu in GPUS.values() if (other := tier_of(spec, gpu)).holds(spec)]
    choices: dict[Tier, str] = {}
    if fitting:
        choices[min(fitting, key=lambda other: other.dollars_per_hour)] = "the cheapest that fits"
    if (own := spec.tier) in fitting:
        choices.setdefault(own, "its registry entry's own")
    ways = [f"{written(way)} ({way.label}, ${way.dollars_per_hour:.2f}/h, {why})" for way, why in choices.items()]
    raise GpuMemoryError(
        f"Model '{spec.key}' does not fit on {tier.label}: its weights are {spec.weights_gb:g} GB, and vLLM uses "
        f"{tier.engine_gb:.1f} of {tier.gpu.memory_gb * tier.n_gpu} GB ({ENGINE_SHARE:.0%}).",
        hint=f"Use {' or '.join(ways)}." if ways else "No single GPU holds it: set n_gpu in its registry entry.",
    )
