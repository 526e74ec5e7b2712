"""What a KV cache takes, compared with what a real engine allocated, and with published shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.kv_shapes import SHAPES
from service.engine.cache_layers import CacheLayer, cache_layers
from service.engine.kv_cache import KVCache
from service.errors import UnknownShapeError
from service.registry.configs import known_config
from service.registry.models import Registry

MEASURED = json.loads((Path(__file__).parents[3] / "bench/results/kv_cache.json").read_text())["shapes"]
IN_FLIGHT = 2 * 8192  # of an H100
QWEN3 = {
    "model_type": "qwen3",
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 1024,
}
# Bytes of a further token in 16 bits, by the models' published shapes
TOKEN_BYTES = {
    "qwen3-8b": 147_456,
    "qwen3-0.6b": 114_688,
    "qwen3-4b": 147_456,
    "qwen3-30b-a3b": 98_304,
    "qwen3-235b": 192_512,
    "qwen3-vl-30b": 98_304,
    "llama-3.1-8b": 131_072,
    "llama-3.1-8b-fp8": 131_072,
    "gemma-3-12b": 65_536,
    "gemma-3-27b": 81_920,
    "gpt-oss-20b": 24_576,
    "gpt-oss-120b": 36_864,
    "qwen3.8-27b": 65_536,
    "qwen3.6-35b-a3b": 20_480,
    "gemma-4-26b-a4b": 20_480,
}


@pytest.mark.parametrize("name", SHAPES)
def test_kv_cache_is_what_a_real_engine_allocated(name: str) -> None:
    """Tokens that a cache of one size holds and bytes of a whole request, within 3 % (`make bench-kv-cache`)."""
    measured = MEASURED[name]
    config = SHAPES[name] | {"mamba_ssm_dtype": measured["ssm_dtype"]}
    layers = cache_layers(config, dtype=measured["dtype"])
    cache = KVCache.of(layers, measured["in_flight_tokens"], block=measured["base_block"])
    length = measured["max_model_len"]
    assert cache.request_bytes(length) == pytest.approx(measured["request_bytes"], rel=0.03)
    assert cache.sequences(measured["memory_bytes"], length) * length == pytest.approx(measured["tokens"], rel=0.03)


@pytest.mark.parametrize("key", TOKEN_BYTES)
def test_token_takes_what_the_published_shape_says(key: str) -> None:
    """Only layers that keep every token grow with it."""
    config = known_config(str(Registry.load().specs[key].hub_id))
    assert config
    assert KVCache.of(cache_layers(config), IN_FLIGHT).token_bytes == TOKEN_BYTES[key]


def test_every_entry_of_the_hub_has_a_known_shape() -> None:
    """And so has every draft that is a repository of its own."""
    specs = Registry.load().specs.values()
    drafts = [spec.speculative.hub_id for spec in specs if spec.speculative]
    for hub_id in (*(spec.hub_id for spec in specs), *drafts):
        assert not hub_id or cache_layers(known_config(hub_id) or {})


@pytest.mark.parametrize(
    ("config", "options", "layers"),
    [
        (QWEN3, {}, {CacheLayer("full", 4096): 28}),
        (QWEN3, {"dtype": "fp8"}, {CacheLayer("full", 2048): 28}),
        (QWEN3, {"n_gpu": 2}, {CacheLayer("full", 2048): 28}),
        (QWEN3, {"n_gpu": 16}, {CacheLayer("full", 512): 28}),  # a head is repeated
        ({"text_config": QWEN3, "model_type": "qwen3_vl"}, {}, {CacheLayer("full", 4096): 28}),
        (QWEN3 | {"sliding_window": 4096, "use_sliding_window": False}, {}, {CacheLayer("full", 4096): 28}),
        (QWEN3 | {"model_type": "mistral", "sliding_window": 4096}, {}, {CacheLayer("window", 4096, 4096): 28}),
        (QWEN3 | {"num_kv_shared_layers": 8}, {}, {CacheLayer("full", 4096): 20}),
        (
            {"model_type": "deepseek_v3", "num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64},
            {"n_gpu": 8},
            {CacheLayer("full", 1152, is_mla=True): 61},
        ),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 34}},
            {},
            {CacheLayer("full", 4096): 5, CacheLayer("window", 4096, 4096): 29},
        ),
        ({"model_type": "bert", "num_hidden_layers": 12}, {}, {}),
    ],
)
def test_layers_are_counted_as_what_they_are(
    config: dict[str, Any], options: dict[str, Any], layers: dict[CacheLayer, int]
) -> None:
    """Heads are shared among GPUs, latent vectors are not; a window keeps no more than itself."""
    found = cache_layers(config, **options)
    assert {layer: found.count(layer) for layer in set(found)} == layers


@pytest.mark.parametrize(
    ("config", "options", "match"),
    [
        ({}, {}, "lacks"),
        ({"model_type": "qwen3", "num_hidden_layers": "x"}, {}, "lacks or mistypes"),
        (QWEN3 | {"layer_types": ["new_attention"] * 28}, {}, "layer of type 'new_attention'"),
        ({"model_type": "deepseek_v4"}, {}, "'deepseek_v4' model is not known"),
        (QWEN3, {"dtype": "int4_per_token_head"}, "dtype 'int4_per_token_head' is not known"),
    ],
)
def test_unknown_shape_is_an_error(config: dict[str, Any], options: dict[str, Any], match: str) -> None:
    """It is never counted as another."""
    with pytest.raises(UnknownShapeError, match=match):
        cache_layers(config, **options)


def test_longest_request_is_the_longest_that_fits() -> None:
    """One token more does not fit beside the empty block."""
    cache = KVCache.of(cache_layers(QWEN3), IN_FLIGHT)
    memory = cache.request_bytes(4096) + cache.block_bytes
    assert (cache.longest(memory, 100_000), cache.longest(memory, 1000), cache.longest(0, 1000)) == (4096, 1000, 0)
    assert cache.sequences(2 * cache.request_bytes(4096), 4096) == 2


def test_window_takes_no_more_for_a_longer_request() -> None:
    """Beyond the window and what the steps hold."""
    cache = KVCache.of([CacheLayer("window", 100, 1024)] * 2, 2048)
    assert cache.request_bytes(100_000) == cache.request_bytes(50_000) == 200 * 16 * (3071 // 16 + 2)
    assert cache.token_bytes == 0


def test_model_without_a_cache_takes_nothing() -> None:
    """An encoder embeds at once."""
    cache = KVCache.of((), IN_FLIGHT)
    assert (cache.request_bytes(512), cache.sequences(1e9, 512)) == (0, float("inf"))
