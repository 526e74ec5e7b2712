"""Context and memory of an engine without a GPU: 8,192 tokens by default, an entry's own where they fit."""

from __future__ import annotations

import pytest

from service import memory
from service.engine import cpu
from service.engine.model_files import ModelFiles
from service.errors import ContextMemoryError
from service.registry.models import ModelSpec

GIB = 1024**3
SMALL = ModelFiles(  # SmolLM2-135M
    {
        "max_position_embeddings": 65536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 576,
    },
    weights_bytes=269_000_000,
)


def spec(**fields: object) -> ModelSpec:
    """Return an entry."""
    return ModelSpec(key="mine", path="mine", **fields)  # type: ignore[arg-type]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> memory.Room:
    """Give this machine 4 GB of memory, of which nothing is used."""
    room = memory.Room(4 * 10**9, "this machine has 4.0 GB")
    monkeypatch.setattr(memory, "_room", lambda: room)
    return room


@pytest.mark.parametrize(
    ("entry", "files", "length"),
    [
        (spec(), None, None),
        (spec(), ModelFiles(), None),
        (spec(), SMALL, 8192),
        (spec(), ModelFiles({"max_position_embeddings": 2048}), 2048),
        (spec(max_model_len=40960), None, 8192),
        (spec(max_model_len=2048), SMALL, 2048),
        (spec(max_model_len=40960, cpu_max_model_len=49152), SMALL, 49152),
    ],
)
def test_context_is_the_models_own_up_to_8192_unless_the_entry_says(
    entry: ModelSpec, files: ModelFiles | None, length: int | None
) -> None:
    """The default keeps a laptop's memory; None leaves it to vLLM."""
    assert cpu.max_model_len(entry, files) == length


def test_kv_cache_holds_one_request_of_the_whole_context() -> None:
    """23,040 bytes a token; what 18 requests of 2,048 tokens take is enough for 8,192 tokens, not for 131,072."""
    many = 18 * 2048 * 23_040
    assert cpu.kv_cache_bytes(spec(), SMALL) == many
    assert cpu.kv_cache_bytes(spec(cpu_max_model_len=32768), SMALL) == many
    assert cpu.kv_cache_bytes(spec(cpu_max_model_len=131072), SMALL) == (131072 + 256) * 23_040
    assert cpu.kv_cache_bytes(spec(weights_gb=0.004)) == 64 * 1024**2
    assert cpu.memory_bytes(spec(), SMALL) == 269_000_000 + many + 2 * GIB


def test_kv_cache_of_a_larger_model_is_two_gib() -> None:
    """Of 114,688 bytes a token, as Qwen3-0.6B's; and that of an encoder, which keeps nothing, is as before."""
    shape = {"num_hidden_layers": 28, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960}
    larger = ModelFiles({**SMALL.config, **shape}, weights_bytes=1_500_000_000)
    assert cpu.kv_cache_bytes(spec(), larger) == 2 * GIB
    encoder = ModelFiles({"model_type": "bert", "max_position_embeddings": 512}, weights_bytes=400_000_000)
    assert cpu.kv_cache_bytes(spec(), encoder) == 2 * GIB


def test_kv_cache_of_a_window_holds_a_window_of_every_sequence() -> None:
    """A layer with a window keeps the window of each sequence, however long it is."""
    window = ModelFiles({**SMALL.config, "model_type": "mistral", "sliding_window": 512}, weights_bytes=269_000_000)
    own = window.kv_cache(cpu.MAX_BATCHED_TOKENS, 128)
    assert own is not None
    assert cpu.kv_cache_bytes(spec(), window) == 18 * own.request_bytes(2048)


def test_memory_of_weights_of_unknown_size_is_a_small_models() -> None:
    """A hub id that is not here yet; an entry's figure counts where there is one."""
    assert cpu.memory_bytes(spec()) == 2 * 10**9 + 4 * GIB
    assert cpu.memory_bytes(spec(weights_gb=8.0)) == 8 * 10**9 + 4 * GIB


def test_context_that_does_not_fit_is_refused_with_the_figures(
    free: memory.Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it needs, of what parts, what there is, and the longest that fits."""
    monkeypatch.setattr(memory, "_held_by_children", lambda: 10**9)
    with pytest.raises(ContextMemoryError) as caught:
        cpu.check_context(spec(cpu_max_model_len=131072), SMALL)
    text = str(caught.value)
    assert "131072 tokens of model 'mine' needs 5.4 GB" in text
    assert "3.0 GB of KV cache, 0.3 GB of weights and 2.1 GB for the engine" in text
    assert "4.0 GB of memory are free: this machine has 4.0 GB" in text
    assert "max_model_len (or cpu_max_model_len) of its entry to 111872 or less" in text
    cpu.check_context(spec(cpu_max_model_len=111872), SMALL)
    assert free.free_bytes == 4 * 10**9


def test_context_that_does_not_fit_at_all_says_what_else_helps(
    free: memory.Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where even the default is too long, a shorter one is no way out."""
    monkeypatch.setattr(memory, "_held_by_children", lambda: 0)
    big = ModelFiles(dict(SMALL.config), weights_bytes=int(free.free_bytes))
    with pytest.raises(ContextMemoryError, match="serve a smaller model"):
        cpu.check_context(spec(cpu_max_model_len=16384), big)


def test_context_of_the_default_is_not_checked(free: memory.Room) -> None:
    """The weights are checked elsewhere, and the cache is what the engine always had."""
    cpu.check_context(spec(max_model_len=131072), SMALL)
    cpu.check_context(spec(cpu_max_model_len=131072), ModelFiles())
    assert free
