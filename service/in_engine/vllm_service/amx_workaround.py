"""Works around a fault of vLLM's CPU build: it dies of an illegal instruction on a first prompt of under six tokens."""

from __future__ import annotations


def enable_amx() -> None:
    """Switch on the processor's matrix unit where torch knows one; vLLM calls this in each of its processes."""
    import torch

    if not torch.cuda.is_available() and hasattr(torch.cpu, "_init_amx"):
        torch.cpu._init_amx()  # torch has no public name for it
