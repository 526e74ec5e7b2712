"""What makes a model fit that does not: the change that is nearest to what was asked first. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from service.engine.cache_layers import text_config
from service.planning.fit import Fit, Verdict, fit, with_tier, with_weights
from service.registry.gpus import GPUS
from service.registry.tiers import Tier

_COUNTS = (1, 2, 4, 8)
_SAME = {"H100!", "B200+"}  # the same GPUs under a second name
_FP8_CAPABILITY = (8, 9)
_FP8_SHARE = 0.58  # of weights in 16 bits: 0.51 to 0.58 of published pairs, in which embeddings and norms stay
_SHORTEST = 2048


@dataclass(frozen=True)
class Change:
    """A way to make it fit.

    Attributes:
        text: What to change.
        fitted: What it leads to.
        dollars_per_hour: Of the GPUs.
    """

    text: str
    fitted: Fit
    dollars_per_hour: float


def changes(fitted: Fit, price: Callable[[Tier], float], *, fast_boot: bool) -> list[Change]:
    """Return what makes it fit: first what keeps the tier, then more of its GPUs, FP8 weights, another GPU."""
    found = [
        *_shorter(fitted),
        *_smaller_cache(fitted, fast_boot=fast_boot),
        *_more_gpus(fitted, fast_boot=fast_boot),
        *_fp8_weights(fitted, fast_boot=fast_boot),
    ]
    other = cheapest(fitted, price, fast_boot=fast_boot)
    if other and other.tier not in {one.tier for _, one in found}:
        found.append((f"another GPU: {_option(other.tier)}", other))
    return [Change(text, one, price(one.tier)) for text, one in found]


def cheapest(fitted: Fit, price: Callable[[Tier], float], *, fast_boot: bool) -> Fit | None:
    """Return the model on the cheapest tier that it is sure to fit; None: there is none."""
    tiers = [
        Tier(gpu, count)
        for gpu in GPUS.values()
        if gpu.name not in _SAME
        for count in _COUNTS
        if count <= gpu.max_count
    ]
    for tier in sorted(tiers, key=lambda tier: (price(tier), tier.n_gpu)):
        if (other := with_tier(fitted, tier, fast_boot=fast_boot)).verdict is Verdict.FITS:
            return other
    return None


def _shorter(fitted: Fit) -> Iterator[tuple[str, Fit]]:
    if fitted.why_refused is None and _SHORTEST <= (longest := fitted.longest) < fitted.max_model_len:
        yield f"a shorter context: --max-model-len {longest}", replace(fitted, max_model_len=longest)


def _smaller_cache(fitted: Fit, *, fast_boot: bool) -> Iterator[tuple[str, Fit]]:
    """Yield the tier with a cache in 8 bits where the entry has none; no GPU older than its own takes it."""
    model = fitted.model
    if model.spec.kv_cache_dtype is None and fitted.tier.gpu.compute_capability >= _FP8_CAPABILITY:
        changed = replace(model, spec=model.spec.model_copy(update={"kv_cache_dtype": "fp8"}))
        other = fit(changed, fitted.tier, fast_boot=fast_boot, max_model_len=fitted.max_model_len)
        if other.verdict is Verdict.FITS:
            yield 'a KV cache in 8 bits: kv_cache_dtype = "fp8" in its entry', other


def _more_gpus(fitted: Fit, *, fast_boot: bool) -> Iterator[tuple[str, Fit]]:
    gpu = fitted.tier.gpu
    for count in _COUNTS:
        if fitted.tier.n_gpu < count <= gpu.max_count:
            other = with_tier(fitted, Tier(gpu, count), fast_boot=fast_boot)
            if other.verdict is Verdict.FITS:
                yield f"more GPUs: {_option(other.tier)}", other
                return


def _fp8_weights(fitted: Fit, *, fast_boot: bool) -> Iterator[tuple[str, Fit]]:
    """Yield the tier with weights of half the size, where the model's own have 16 bits."""
    model = fitted.model
    if "quantization_config" in model.config or "quantization_config" in text_config(model.config):
        return
    smaller = with_weights(model, model.weights_bytes * _FP8_SHARE)
    other = fit(smaller, fitted.tier, fast_boot=fast_boot, max_model_len=fitted.max_model_len)
    if other.verdict is Verdict.FITS:
        yield f"an FP8 variant of the model, of about {smaller.weights_bytes / 1e9:.0f} GB", other


def _option(tier: Tier) -> str:
    return f"--gpu {tier.gpu.name}" + (f" --n-gpu {tier.n_gpu}" if tier.n_gpu > 1 else "")
