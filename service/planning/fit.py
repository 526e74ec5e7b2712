"""Whether a model fits a GPU tier: weights, KV cache, activations, graphs, draft. Pure; ranges, as no GPU was measured.

vLLM takes a share of the GPU's memory, loads the weights, measures a step, and gives the rest to the KV cache. It
refuses a context of which one request does not fit into the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from service.engine.args import SPECULATIVE_BATCHED_TOKENS
from service.engine.cache_layers import CacheLayer, cache_layers, text_config
from service.engine.kv_cache import KVCache
from service.planning.ranges import Range
from service.registry import extra_args
from service.registry.models import ModelSpec
from service.registry.tiers import ENGINE_SHARE, Tier

_GIB = 1024**3
_BYTES = 2  # of an activation
# Memory that a program finds, as a share of the vendor's GB. Cards with GDDR keep some of it for error correction; the
# others have GiB where the vendor writes GB. Published readings lie within; none was taken here.
_GDDR = {"T4", "L4", "A10", "L40S", "RTX-PRO-6000"}
_GDDR_LOW, _LOW, _HIGH = 0.975, 1.0, _GIB / 1e9
# CUDA's context and libraries; more where GPUs speak to each other. Typical of vLLM's own logs, not measured here.
_OTHER, _OTHER_OF_SEVERAL = Range(0.3e9, 0.8e9), Range(0.5e9, 2.0e9)
_GRAPHS = Range(0.3e9, 2.0e9)
_ENCODER = Range(0.1e9, 2.0e9)  # a step of the encoder of images or recordings
_ASYNC_STEPS = 2  # steps that overlap, unless the entry forbids it
_LARGEST_ITEM = {"gemma4": 32 * 78}  # tokens of a video, which vLLM does not split: the least that a step has
_SORTED_COPIES = 2  # of the logits in 32 bits, while tokens are chosen


class Verdict(Enum):
    """Whether it fits."""

    FITS = "fits"
    MAY_FIT = "may fit"
    DOES_NOT_FIT = "does not fit"


@dataclass(frozen=True)
class PlannedModel:
    """What is known of a model.

    Attributes:
        spec: Its registry entry, or what stands for one.
        config: Its `config.json`.
        weights_bytes: What the engine reads.
        max_model_len: The context that it was made for; None: it does not say.
        draft_config: Of the draft that is a repository of its own; None: there is none, or its shape is not known.
    """

    spec: ModelSpec
    config: Mapping[str, Any]
    weights_bytes: float
    max_model_len: int | None = None
    draft_config: Mapping[str, Any] | None = None

    @property
    def context(self) -> int:
        """The context that is served unless another is asked for."""
        own = extra_args.number_of(self.spec.extra_args, "--max-model-len")
        return int(own or 0) or self.spec.max_model_len or self.max_model_len or 8192


@dataclass(frozen=True)
class Fit:
    """A model on a tier. Bytes are of one of its GPUs.

    Attributes:
        memory: What vLLM uses.
        parts: What the KV cache does not get, by name.
        cache: The allocation.
        kv_cache_dtype: None: the model's own.
        why_refused: Why vLLM does not run it there whatever memory there is, a sentence; None: it does.
    """

    model: PlannedModel
    tier: Tier
    max_model_len: int
    memory: Range
    parts: Mapping[str, Range]
    cache: KVCache
    kv_cache_dtype: str | None
    why_refused: str | None

    @property
    def kv_bytes(self) -> Range:
        """What is left for the KV cache; below zero where it is lacking."""
        left = self.memory
        for part in self.parts.values():
            left = left.minus(part)
        return left

    @property
    def verdict(self) -> Verdict:
        """Whether one request of the whole context fits."""
        if self.why_refused:
            return Verdict.DOES_NOT_FIT
        needed = self.cache.request_bytes(self.max_model_len) + self.cache.block_bytes
        if self.kv_bytes.low >= needed:
            return Verdict.FITS
        return Verdict.MAY_FIT if self.kv_bytes.high >= needed else Verdict.DOES_NOT_FIT

    def sequences(self, tokens: int) -> Range:
        """Return how many requests of so many tokens the cache holds."""
        return Range(*(max(0.0, self.cache.sequences(size, tokens)) for size in self.kv_bytes))

    @property
    def tokens(self) -> Range:
        """Tokens of requests of the whole context that the cache holds: what vLLM logs as the size of its cache."""
        return self.sequences(self.max_model_len).times(self.max_model_len)

    @property
    def longest(self) -> int:
        """The longest context that is sure to fit, in steps of 1,024 tokens; 0: none."""
        limit = self.model.max_model_len or self.max_model_len
        return self.cache.longest(self.kv_bytes.low, limit) // 1024 * 1024


def fit(
    model: PlannedModel,
    tier: Tier,
    *,
    fast_boot: bool,
    max_model_len: int | None = None,
) -> Fit:
    """Return how a model fits a tier.

    Args:
        model: The model.
        tier: Where it is to run.
        fast_boot: Without compilation and CUDA graphs.
        max_model_len: Another context than the entry's.

    Raises:
        UnknownShapeError: It is not known what vLLM keeps of it.
    """
    spec, gpu = model.spec, tier.gpu
    has_kernels = gpu.compute_capability >= spec.tier.gpu.compute_capability
    dtype = spec.kv_cache_dtype if has_kernels else None  # on older GPUs the engine leaves it out
    batched, sequences = _step(tier, model)
    layers = [*cache_layers(model.config, n_gpu=tier.n_gpu, dtype=dtype, draft_tokens=_draft_tokens(spec))]
    layers += _draft_layers(model, layers, tier.n_gpu, dtype)
    # vLLM counts what an encoder makes as long as a step, though a recording is shorter
    layers = [replace(layer, window=batched) if layer.kind == "cross" else layer for layer in layers]
    steps = 1 if spec.async_scheduling is False else _ASYNC_STEPS
    return Fit(
        model=model,
        tier=tier,
        max_model_len=max_model_len or model.context,
        memory=_engine_memory(tier, extra_args.number_of(spec.extra_args, "--gpu-memory-utilization") or ENGINE_SHARE),
        parts={
            "weights": Range(*(model.weights_bytes / tier.n_gpu,) * 2),
            **({"draft": _draft_weights(model).times(1 / tier.n_gpu)} if _has_draft(spec) else {}),
            "activations": _activations(model, tier.n_gpu, batched, sequences),
            **({} if fast_boot else {"CUDA graphs": _GRAPHS}),
            "CUDA and libraries": _OTHER if tier.n_gpu == 1 else _OTHER_OF_SEVERAL,
        },
        cache=KVCache.of(layers, steps * batched),
        kv_cache_dtype=dtype,
        why_refused=_why_refused(model, tier),
    )


def _engine_memory(tier: Tier, share: float) -> Range:
    low = _GDDR_LOW if tier.gpu.name in _GDDR else _LOW
    return Range(low, _HIGH).times(tier.gpu.memory_gb * 1e9 * share)


def _step(tier: Tier, model: PlannedModel) -> tuple[int, int]:
    """Return the tokens and the sequences of a step. Source: vllm/engine/arg_utils.py, 0.32.0, of its API server."""
    memory_gib = tier.gpu.memory_gb * 1e9 / _GIB
    tokens, sequences = 2048, 256
    if memory_gib >= 160:
        tokens, sequences = 16384, 1024
    elif memory_gib >= 70 and "A100" not in tier.gpu.name:
        tokens, sequences = 8192, 1024
    if model.spec.speculative:
        tokens = SPECULATIVE_BATCHED_TOKENS
    tokens = max(tokens, _LARGEST_ITEM.get(str(model.config.get("model_type")), 0))
    own = model.spec.extra_args
    return (
        int(extra_args.number_of(own, "--max-num-batched-tokens") or tokens),
        int(extra_args.number_of(own, "--max-num-seqs") or sequences),
    )


def _why_refused(model: PlannedModel, tier: Tier) -> str | None:
    without_weights = model.spec.model_copy(update={"weights_gb": None})
    if error := tier.why_unfit(without_weights):
        return error.message
    heads = text_config(model.config).get("num_attention_heads")
    if isinstance(heads, int) and heads % tier.n_gpu:
        return f"vLLM does not spread {heads} attention heads over {tier.n_gpu} GPUs."
    return None


def _activations(model: PlannedModel, n_gpu: int, batched: int, sequences: int) -> Range:
    """Return the peak of a step beside the weights: a layer of all its tokens, then the logits of all its sequences."""
    text = text_config(model.config)
    hidden = int(text.get("hidden_size") or text.get("d_model") or 4096)
    inner = int(text.get("intermediate_size") or 4 * hidden)
    if experts := text.get("num_experts_per_tok") or text.get("top_k_experts"):
        routed = int(experts) * int(text.get("moe_intermediate_size") or inner)
        inner = routed + int(experts) * hidden // 3  # each chosen expert has an output of its own
    layer = batched * (2 * hidden + 3 * inner / n_gpu) * _BYTES
    logits = sequences * int(text.get("vocab_size") or 0) * 4 * _SORTED_COPIES
    peak = Range(layer, 2 * layer + logits)
    return peak + _ENCODER if {"image", "audio"} & {*model.spec.modalities} else peak


def _has_draft(spec: ModelSpec) -> bool:
    return spec.speculative is not None and spec.speculative.hub_id is not None


def _draft_tokens(spec: ModelSpec) -> int:
    return spec.speculative.num_speculative_tokens if spec.speculative else 0


def _draft_layers(model: PlannedModel, own: list[CacheLayer], n_gpu: int, dtype: str | None) -> list[CacheLayer]:
    speculative = model.spec.speculative
    if speculative is None:
        return []
    if model.draft_config:
        return [*cache_layers(model.draft_config, n_gpu=n_gpu, dtype=dtype)]
    if speculative.method == "mtp":
        return [layer for layer in own if layer.kind == "full"][:1]
    return []


def _draft_weights(model: PlannedModel) -> Range:
    """Return what a draft's weights take; its embeddings may be those of the model itself."""
    if model.draft_config is None:
        return Range(0.0, 0.1 * model.weights_bytes)
    text = text_config(model.draft_config)
    hidden, inner, vocabulary = (
        int(text.get(name) or 0) for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    heads, size = int(text.get("num_attention_heads") or 1), int(text.get("head_dim") or 128)
    kv_heads = int(text.get("num_key_value_heads") or heads)
    layer = 2 * hidden * (heads + 2 * kv_heads) * size + heads * size * hidden + 3 * hidden * inner
    head = int(model.draft_config.get("draft_vocab_size") or vocabulary) * hidden
    rest = (int(text.get("num_hidden_layers") or 1) * layer + head + 3 * hidden * hidden) * _BYTES
    return Range(rest, rest + vocabulary * hidden * _BYTES)


def with_tier(fitted: Fit, tier: Tier, *, fast_boot: bool) -> Fit:
    """Return how the same model with the same context fits another tier."""
    return fit(fitted.model, tier, fast_boot=fast_boot, max_model_len=fitted.max_model_len)


def with_weights(model: PlannedModel, weights_bytes: float) -> PlannedModel:
    """Return the model with weights of another size."""
    return replace(model, weights_bytes=weights_bytes, spec=model.spec.model_copy(update={"weights_gb": None}))
