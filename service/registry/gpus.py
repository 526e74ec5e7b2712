"""The GPUs that Modal offers: memory and price. Pure data and look-up; `hardware.py` probes this machine.

Prices are per GPU, before CPU and memory; a choice of region multiplies them by 1.5 to 1.75.
Source: modal.com/pricing as transcribed on 2026-09-26, Modal's GPU guide as of 2026-08-22; compute capabilities are
those of NVIDIA's table (developer.nvidia.com/cuda-gpus).
"""

from __future__ import annotations

import re
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
        compute_capability: What it can compute, by NVIDIA's number: major, minor.
        max_count: How many one container can have.
    """

    name: str
    memory_gb: int
    dollars_per_hour: float
    compute_capability: tuple[int, int]
    max_count: int = 8

    @property
    def slug(self) -> str:
        """Name for apps and model suffixes: lower case, `!` and `+` spelled out (`H100!` -> `h100-only`)."""
        return _SLUGS.get(self.name) or self.name.lower().replace("!", "-only").replace("+", "-plus")

    def is_named_in(self, label: str) -> bool:
        """Tell whether a driver's name such as `2 x NVIDIA A100-SXM4-80GB` may be this GPU's.

        A name of no known GPU may be any's, and Modal may serve an H200 where an H100 was requested.
        """
        if not any(re.search(_word(gpu), label) for gpu in _ALL):
            return True
        return bool(re.search(_word(self), label) or (self.name == "H100" and "H200" in label))


def _word(gpu: Gpu) -> str:
    """Return an expression for the GPU's name in the words of its driver, which has more between the parts."""
    parts = [re.escape(part) for part in re.split(r"[-!+]", gpu.name) if part]
    return r"\b" + r"\b.*\b".join("A10G?" if part == "A10" else part for part in parts) + r"\b"


_SLUGS = {"A100-80GB": "a100"}
_ALL = (
    Gpu("T4", 16, 0.59, (7, 5)),
    Gpu("L4", 24, 0.80, (8, 9)),
    Gpu("A10", 24, 1.10, (8, 6), max_count=4),
    Gpu("L40S", 48, 1.95, (8, 9)),
    Gpu("A100-40GB", 40, 2.10, (8, 0)),
    Gpu("A100-80GB", 80, 2.50, (8, 0)),  # `A100` means this one here; Modal's own `A100` may be either
    Gpu("RTX-PRO-6000", 96, 3.03, (12, 0)),
    Gpu("H100", 80, 3.95, (9, 0)),  # Modal may serve an H200 at the same price; H100! never
    Gpu("H100!", 80, 3.95, (9, 0)),
    Gpu("H200", 141, 4.54, (9, 0)),
    Gpu("B200", 180, 6.25, (10, 0)),
    Gpu("B200+", 180, 6.25, (10, 0)),
    Gpu("B300", 288, 7.10, (10, 3)),
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
