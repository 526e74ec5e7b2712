"""Pools of a deployed tier, from Python: any model on any GPU, for batches, `.map` and calls that need no endpoint."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import modal

from service.errors import UnknownModelError
from service.registry.gpus import find_gpu
from service.registry.models import Registry
from service.registry.tiers import Tier, check_fit
from service.settings import Settings


def variant(
    model: str,
    gpu: str,
    n_gpu: int = 1,
    fast_boot: bool | None = None,
    scaledown_window: int | None = None,
    *,
    app: str | None = None,
) -> Any:
    """Return the pool that serves `model` on `gpu`: an instance of the deployed class `Server`.

    `variant("qwen3-8b", "H200").complete.remote("/v1/chat/completions", {...})` calls it. Each distinct set of
    arguments is an autoscaled pool with snapshots of its own, so this one function builds all, always in one order.

    Args:
        model: Any name of the registry that was deployed.
        gpu: A GPU that Modal offers.
        n_gpu: GPUs to spread the model over.
        fast_boot: Skip compilation and CUDA graphs; None leaves the deployed value.
        scaledown_window: Seconds without a request before a replica stops; None leaves the deployed value.
        app: The deployed app whose class is used; by default that of the GPU's own tier.

    Raises:
        UnknownGpuError: Modal offers no such GPU, or not so many.
        GpuFitError: The model cannot run on those GPUs; a model that this machine's registry does not know is not
            checked.
        modal.exception.NotFoundError: The app is not deployed (raised at the first call).
    """
    tier = Tier(find_gpu(gpu), n_gpu)
    with suppress(UnknownModelError):
        spec = Registry.load(Settings.load().models_file).resolve(model).spec
        check_fit(spec, tier, lambda other: f"gpu='{other.gpu.name}', n_gpu={other.n_gpu}")
    server = modal.Cls.from_name(app or tier.app_name, "Server")
    options = server.with_options(gpu=tier.request, scaledown_window=scaledown_window)
    given = {} if fast_boot is None else {"fast_boot": fast_boot}
    return options(model=model, **given, n_gpu=n_gpu)
