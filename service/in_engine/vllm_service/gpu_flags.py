"""Leaves out flags that were chosen for another GPU than the one at hand.

An entry's MoE kernels and KV cache type are chosen for the GPU that it names. vLLM does not pass over what a GPU cannot
do: with gpt-oss's entry it ended while it built the model on every GPU but Hopper's (tests/cuda). Only the engine knows
its GPU: under a CPU snapshot it starts where none is visible, and a variant of a pool runs on another than its entry's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

VARIABLE = "ENGINE_GPU_FLAGS"  # JSON: flag -> the least and the first too high compute capability, each [major, minor]
_LOGGER = logging.getLogger("vllm.vllm_service.gpu_flags")  # below vLLM's logger, the only one that has a handler


def supported(argv: Sequence[str], bounds: str, capability: tuple[int, int]) -> list[str]:
    """Return the arguments without the flags, and their values, whose bounds this compute capability is outside of.

    Args:
        argv: Arguments of `vllm serve`.
        bounds: The value of `VARIABLE`; only the first of several equal flags is the entry's.
        capability: Compute capability of the GPU.
    """
    kept = list(argv)
    for flag, (least, too_high) in json.loads(bounds or "{}").items():
        if flag in kept and not tuple(least) <= capability < tuple(too_high):
            at = kept.index(flag)
            _LOGGER.info(
                "Left out %s %s, chosen for another GPU; on this one, of compute capability %d.%d, vLLM chooses.",
                *kept[at : at + 2],
                *capability,
            )
            del kept[at : at + 2]
    return kept
