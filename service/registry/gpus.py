"""The GPUs that Modal offers: memory and price. Pure data and look-up; `hardware.py` probes this machine.

Prices are per GPU, before CPU and memory; a choice of region multiplies them by 1.5 to 1.75.
Source: modal.com/pricing as transcribed on 2026-09-26, Modal's GPU guide as of 2026-08-22.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.errors import UnknownGpuError, did_you_mean

PRICES_SOURCE = "modal.com/pricing"
PRICES_DATE = "2026-09-26"


@dataclass(frozen=True)
class Gpu:
    """One value of Modal's `gpu=`.

    Attributes:
        name: Modal's spelling, such as `A100-80GB`.
        memory_gb: Memory of one GPU, as its vendor states it.
        dollars_per_hour: Price of one GPU.
        max_count: How many one container can have.
    """

    name: str
    memory_gb: int
    dollars_per_hour: float
    max_count: int = 8

    @property
    def slug(self) -> str:
        """Name for apps and model suffixes: lower case, `!` and `+` spelled out (`H100!` -> `h100-only`)."""
        return _SLUGS.get(self.name) or self.name.lower().replace("!", "-only").replace("+", "-plus")


_SLUGS = {"A100-80GB": "a100"}
_ALL = (
    Gpu("T4", 16, 0.59),
    Gpu("L4", 24, 0.80),
    Gpu("A10", 24, 1.10, max_count=4),
    Gpu("L40S", 48, 1.95),
    Gpu("A100-40GB", 40, 2.10),
    Gpu("A100-80GB", 80, 2.50),  # `A100` means this one here; Modal's own `A100` may be either
    Gpu("RTX-PRO-6000", 96, 3.03),
    Gpu("H100", 80, 3.95),  # Modal may serve an H200 at the same price; H100! never
    Gpu("H100!", 80, 3.95),
    Gpu("H200", 141, 4.54),
    Gpu("B200", 180, 6.25),
    Gpu("B200+", 180, 6.25),
    Gpu("B300", 288, 7.10),
)
GPUS = {gpu.name: gpu for gpu in _ALL}
BY_SLUG = {gpu.slug: gpu for gpu in _ALL} | {"a100-80gb": GPUS["A100-80GB"]}  # the name in full is no second tier
_BY_NAME = {gpu.name.lower(): gpu for gpu in _ALL} | BY_SLUG | {"a10g": GPUS["A10"]}


def find_gpu(name: str) -> Gpu:
    """Return the GPU of this name, in any case.

    Raises:
        UnknownGpuError: Modal offers none of this name.
    """
    gpu = _BY_NAME.get(name.lower())
    if gpu:
        return gpu
    if ":" in name:
        kind, _, count = name.partition(":")
        hint = f" The count is a setting of its own: write SERVICE_GPU={kind} SERVICE_N_GPU={count}."
    else:
        hint = did_you_mean(name, GPUS)
    raise UnknownGpuError(f"Unknown GPU '{name}'.", hint=f"{hint.strip()} Modal offers: {', '.join(GPUS)}.".strip())


def check_count(gpu: Gpu, n_gpu: int) -> None:
    """Refuse more GPUs than one container can have.

    Raises:
        UnknownGpuError: `n_gpu` is outside 1 to `gpu.max_count`.
    """
    if not 1 <= n_gpu <= gpu.max_count:
        raise UnknownGpuError(
            f"{n_gpu} x {gpu.name} were requested; Modal attaches 1 to {gpu.max_count} {gpu.name} to one container.",
            hint="Lower the number of GPUs, or choose a GPU with more memory.",
        )
