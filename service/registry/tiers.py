"""GPU tiers: a GPU type and a count make one deployed app. Their names, prices, and whether a model fits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.errors import ComputeCapabilityError, GpuFitError, GpuMemoryError
from service.registry.gpus import GPUS, Gpu, check_count, find_gpu

if TYPE_CHECKING:
    from service.registry.models import ModelSpec

# vLLM's default of gpu_memory_utilization; nothing here sets another. Source: vllm/config/cache.py of vLLM 0.32.0.
ENGINE_SHARE = 0.92
_COUNTED = re.compile(r"(.+)x([1-8])", re.IGNORECASE)


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

    def model_app_name(self, key: str) -> str:
        """Return the name of an app for one model on it: `vllm-qwen3-8b-h100`."""
        return f"vllm-{key}-{self.app_name.removeprefix('vllm-')}"

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
        """Tell whether a model can run on it: there are kernels for it and memory for its weights, as far as known."""
        return self.why_unfit(spec) is None

    def why_unfit(self, spec: ModelSpec) -> GpuFitError | None:
        """Return why a model cannot run on it; None: it can, as far as is known."""
        capability = ".".join(map(str, self.gpu.compute_capability))
        if spec.min_compute_capability and spec.min_compute_capability > float(capability):
            return ComputeCapabilityError(
                f"Model '{spec.key}' does not run on {self.label}: vLLM has kernels for it from compute capability "
                f"{spec.min_compute_capability} on, and {self.gpu.name} has {capability}."
            )
        if spec.weights_gb and spec.weights_gb >= self.engine_gb:
            return GpuMemoryError(
                f"Model '{spec.key}' does not fit on {self.label}: its weights are {spec.weights_gb:g} GB, and vLLM "
                f"uses {self.engine_gb:.1f} of {self.gpu.memory_gb * self.n_gpu} GB ({ENGINE_SHARE:.0%})."
            )
        return None


def count_label(gpu_name: str, n_gpu: int) -> str:
    """Return what people read of a number of GPUs: `NVIDIA L4`, `2 x NVIDIA H200`."""
    return gpu_name if n_gpu == 1 else f"{n_gpu} x {gpu_name}"


def tier_of_app(app_name: str) -> Tier | None:
    """Return the tier that an app is named after: `vllm-h200x2`; None: it is not named after a tier."""
    tiers = (Tier(gpu, n_gpu) for gpu in GPUS.values() for n_gpu in range(1, gpu.max_count + 1))
    return next((tier for tier in tiers if tier.app_name == app_name), None)


def tier_of_label(label: str) -> Tier:
    """Return the tier of a label: `H100`, `2 x H200`.

    Raises:
        UnknownGpuError: It is no label of a tier.
    """
    count, _, gpu = label.rpartition(" x ")
    return Tier(find_gpu(gpu), int(count) if count.isdecimal() else 1)


def parse_tier(text: str) -> tuple[Gpu, int | None]:
    """Return GPU and count of a tier as it is written: `h100`, `H200:2`, `h200x2`; None: no count is given.

    Raises:
        UnknownGpuError: Modal offers no such GPU, or not so many in one container.
    """
    name, separator, count = text.partition(":")
    if not separator and (match := _COUNTED.fullmatch(text)):
        name, count = match.groups()
    gpu = find_gpu(name if count.isdecimal() or not separator else text)
    if count:
        check_count(gpu, int(count))
    return gpu, int(count) if count else None


def tier_of(spec: ModelSpec, gpu: Gpu | None = None, n_gpu: int | None = None) -> Tier:
    """Return the tier of a model: GPU and count as given, else its entry's; one GPU if it is not the entry's type."""
    chosen = gpu or spec.tier.gpu
    return Tier(chosen, n_gpu or (spec.n_gpu if chosen == spec.tier.gpu else 1))


def check_fit(spec: ModelSpec, tier: Tier, written: Callable[[Tier], str]) -> None:
    """Refuse a tier that a model cannot run on; the hint names tiers that it can.

    Args:
        spec: The model.
        tier: Where it is to run.
        written: Returns a tier as the caller writes it: `SERVICE_GPU=H100`, or the name of a model.

    Raises:
        GpuFitError: The engine would have no kernels, or run out of memory while it loads the weights.
    """
    if (error := tier.why_unfit(spec)) is None:
        return
    fitting = [other for gpu in GPUS.values() if (other := tier_of(spec, gpu)).holds(spec)]
    choices: dict[Tier, str] = {}
    if fitting:
        choices[min(fitting, key=lambda other: other.dollars_per_hour)] = "the cheapest that fits"
    if (own := spec.tier) in fitting:
        choices.setdefault(own, "its registry entry's own")
    ways = [f"{written(way)} ({way.label}, ${way.dollars_per_hour:.2f}/h, {why})" for way, why in choices.items()]
    error.hint = f"Use {' or '.join(ways)}." if ways else "No single GPU holds it: set n_gpu in its registry entry."
    raise error
