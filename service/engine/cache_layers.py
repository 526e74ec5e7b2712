"""What each layer of a model keeps of a sequence, by its `config.json`: keys and values, a window of them, or a state.

Layers are counted as what vLLM makes of them. A shape that is not known here is an error, never a guess.
Sources: vllm/v1/kv_cache_interface.py, model_executor/layers/mamba/mamba_utils.py and the models' own modules, 0.32.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from service.errors import UnknownShapeError

_BYTES = 2  # of a number: bfloat16 or float16, to which vLLM casts float32 too
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config", "transformer_layer_config")
_FULL, _WINDOW, _CHUNK, _STATE, _CONV, _NONE = "full", "window", "chunk", "state", "conv", "none"
_LAYER_TYPES = {
    **dict.fromkeys(("full_attention", "attention", "global_attention", "*"), _FULL),
    **dict.fromkeys(("sliding_attention", "sliding_window_attention"), _WINDOW),
    **dict.fromkeys(("chunked_attention",), _CHUNK),
    **dict.fromkeys(("linear_attention", "mamba", "mamba2", "M"), _STATE),
    "conv": _CONV,
    **dict.fromkeys(("mlp", "moe", "-", "E"), _NONE),
}
# Families whose windows stand in the model's code: every n-th layer sees all, or the first of two has a window.
_PATTERNS = {"gemma3_text": 6, "cohere2": 4, "gemma2": 2, "gpt_oss": 2}
_DEFAULTS: dict[str, dict[str, int]] = {  # of transformers, where a config.json leaves them out
    "gemma3_text": {"head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 4096},
    "gemma2": {"head_dim": 256, "sliding_window": 4096},
    "gemma": {"head_dim": 256},
}
# Other caches than those below: compressed, or per head.
_UNKNOWN_FAMILIES = {"deepseek_v4", "deepseek_v41", "kimi_linear", "minimax_text_01", "minimax_m1", "jamba"}
_WITHOUT_CACHE = {"bert", "roberta", "xlm-roberta", "modernbert", "nomic_bert", "gte", "new"}  # encoders
_DTYPES = {"auto": _BYTES, "bfloat16": 2, "float16": 2, "half": 2, "float": 4, "float32": 4}


@dataclass(frozen=True)
class CacheLayer:
    """What one layer keeps on one GPU.

    Attributes:
        kind: `full`: of every token; `window`: of the newest tokens; `cross`: of what an encoder made of a recording;
            `state`: of a sequence, however long.
        size: Bytes of a token, or of the state.
        window: How many tokens a window has, or a recording.
        states: How many states of a sequence there are: the one in use, and those for the prefix cache.
        is_mla: It keeps one latent vector for all heads, on every GPU.
    """

    kind: Literal["full", "window", "cross", "state"]
    size: int
    window: int = 0
    states: int = 0
    is_mla: bool = False


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part about the language model, of a model that also sees or hears, or of a draft."""
    for name in _TEXT_PARTS:
        if isinstance(part := config.get(name), dict):
            return text_config(part)
    return config


def cache_layers(
    config: Mapping[str, Any], *, n_gpu: int = 1, dtype: str | None = None, draft_tokens: int = 0
) -> tuple[CacheLayer, ...]:
    """Return the layers of a model that keep something.

    Args:
        config: Its `config.json`.
        n_gpu: GPUs that it is spread over.
        dtype: Of the KV cache, by vLLM's name; None: the model's own.
        draft_tokens: Tokens that are speculated in a step; states have room for them.

    Raises:
        UnknownShapeError: It is not known what vLLM keeps of it.
    """
    text = text_config(config)
    family = str(text.get("model_type") or config.get("model_type") or "")
    text = {**_DEFAULTS.get(family, {}), **{name: value for name, value in text.items() if value is not None}}
    if family == "whisper":
        return _of_whisper(text, n_gpu, _bytes_of(dtype))
    if family in _UNKNOWN_FAMILIES or "compress_ratios" in text or text.get("is_encoder_decoder"):
        raise UnknownShapeError(f"What vLLM keeps of a '{family}' model is not known here.")
    if family in _WITHOUT_CACHE:
        return ()
    shape = _Shape(text, family, n_gpu, _bytes_of(dtype))
    try:
        kinds = _kinds(text, family)
        layers = [layer for kind in kinds for layer in shape.layers(kind, draft_tokens)]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UnknownShapeError(f"The config.json of this '{family}' model lacks or mistypes {error}.") from error
    return tuple(layers)


def _of_whisper(text: Mapping[str, Any], n_gpu: int, number_bytes: int) -> tuple[CacheLayer, ...]:
    """Return the decoder's layers, each of which keeps its own tokens, and those of the encoder."""
    try:
        heads, n_layers = int(text["decoder_attention_heads"]), int(text["decoder_layers"])
        size = 2 * -(-heads // n_gpu) * (int(text["d_model"]) // heads) * number_bytes
        own, cross = CacheLayer("full", size), CacheLayer("cross", size, int(text["max_source_positions"]))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UnknownShapeError(f"The config.json of this 'whisper' model lacks or mistypes {error}.") from error
    return (own,) * n_layers + (cross,) * n_layers


def _bytes_of(dtype: str | None) -> int:
    name = dtype or "auto"
    if name in {"fp8_per_token_head", "int8_per_token_head"} or not name.startswith(("fp8", *_DTYPES)):
        raise UnknownShapeError(f"What vLLM keeps with the KV cache dtype '{name}' is not known here.")
    return 1 if name.startswith("fp8") else _DTYPES[name]


def _kinds(text: Mapping[str, Any], family: str) -> list[str]:
    """Return what each layer is."""
    n_layers = int(text.get("num_hidden_layers") or text["n_layer"])
    own = n_layers - int(text.get("num_kv_shared_layers") or 0)  # the last ones read what earlier ones keep
    has_window = bool(text.get("sliding_window")) and text.get("use_sliding_window", True)
    listed = text.get("layer_types") or text.get("layers_block_type") or text.get("hybrid_override_pattern")
    if listed:
        unknown = [name for name in listed if name not in _LAYER_TYPES]
        if unknown:
            raise UnknownShapeError(f"What vLLM keeps of a layer of type '{unknown[0]}' is not known here.")
        kinds = [_LAYER_TYPES[name] for name in listed]
        return [_FULL if kind == _WINDOW and not has_window else kind for kind in kinds][:own]
    if family == "falcon_h1":
        return [_FULL, _STATE] * n_layers
    if "attn_layer_indices" in text:
        return [_FULL if i in text["attn_layer_indices"] else _STATE for i in range(own)]
    other, interval = _FULL, 0
    if text.get("full_attention_interval") or family == "qwen3_next":
        other, interval = _STATE, int(text.get("full_attention_interval") or 4)
    elif text.get("attention_chunk_size"):
        other, interval = _CHUNK, int(text.get("no_rope_layer_interval") or 4)
    elif has_window:
        pattern = text.get("sliding_window_pattern") or text.get("_sliding_window_pattern") or _PATTERNS.get(family)
        other, interval = _WINDOW, int(pattern or 0)
    return [_FULL if interval and (i + 1) % interval == 0 else other for i in range(own)]


@dataclass(frozen=True)
class _Shape:
    text: Mapping[str, Any]
    family: str
    n_gpu: int
    bytes: int

    def layers(self, kind: str, draft_tokens: int) -> list[CacheLayer]:
        """Return what one layer of this kind keeps; some keep two things."""
        if kind == _NONE:
            return []
        if kind in {_STATE, _CONV}:
            size = self._conv(draft_tokens) if kind == _CONV else self._state(draft_tokens)
            return [CacheLayer("state", size, states=2 + draft_tokens + (kind == _STATE and not self._is_delta_net))]
        if self.text.get("kv_lora_rank"):
            return self._latent()
        if kind == _FULL:
            return [CacheLayer("full", self._attention(is_full=True))]
        window = self.text["sliding_window" if kind == _WINDOW else "attention_chunk_size"]
        return [CacheLayer("window", self._attention(is_full=False), int(window))]

    def _attention(self, *, is_full: bool) -> int:
        text = self.text
        n_heads = int(text.get("num_attention_heads") or text["n_head"])
        size = int(text.get("head_dim") or int(text.get("hidden_size") or text["n_embd"]) // n_heads)
        kv_heads = int(text.get("num_key_value_heads") or (1 if text.get("multi_query") else n_heads))
        if is_full:
            size = int(text.get("global_head_dim") or size)
            kv_heads = int(text.get("num_global_key_value_heads") or kv_heads)
        return 2 * self._share(kv_heads) * size * self.bytes

    def _share(self, kv_heads: int) -> int:
        """Return the KV heads on one GPU: fewer heads than GPUs are repeated."""
        return max(1, kv_heads // self.n_gpu)

    def _latent(self) -> list[CacheLayer]:
        text = self.text
        size = (int(text["kv_lora_rank"]) + int(text["qk_rope_head_dim"])) * self.bytes
        if not (index := text.get("index_head_dim")):
            return [CacheLayer("full", size, is_mla=True)]
        if self.bytes == 1:
            size = 656  # DeepSeek's own format of eight bits
        return [
            CacheLayer("full", size, is_mla=True),
            CacheLayer("full", int(index) + int(index) // 128 * 4, is_mla=True),
        ]

    def _conv(self, draft_tokens: int) -> int:
        dim = int(self.text.get("conv_dim") or self.text["hidden_size"])
        return dim // self.n_gpu * (int(self.text["conv_L_cache"]) - 1 + draft_tokens) * _BYTES

    def _state(self, draft_tokens: int) -> int:
        """Return the bytes of a state: of the convolution, and of what is carried from token to token."""
        text = self.text
        if self._is_delta_net:
            heads, size = int(text["linear_num_value_heads"]), int(text["linear_value_head_dim"])
            key = int(text["linear_key_head_dim"])
            conv, width = (
                2 * key * int(text["linear_num_key_heads"]) + size * heads,
                int(text["linear_conv_kernel_dim"]),
            )
        else:
            heads, size, key, conv, width = self._mamba2()
        ssm = _DTYPES.get(str(text.get("mamba_ssm_dtype") or text.get("mamba_ssm_cache_dtype") or self._ssm), _BYTES)
        carried = heads // self.n_gpu * size * key * ssm
        return conv // self.n_gpu * (width - 1 + draft_tokens) * _BYTES + carried

    @property
    def _is_delta_net(self) -> bool:
        return "linear_num_value_heads" in self.text

    @property
    def _ssm(self) -> str:
        return "float32" if self.family == "nemotron_h" else "auto"

    def _mamba2(self) -> tuple[int, int, int, int, int]:
        """Return heads, head size, state size, width of the convolution, and its length."""
        text = self.text
        if self.family == "nemotron_h":
            heads, size, groups = (int(text[name]) for name in ("mamba_num_heads", "mamba_head_dim", "n_groups"))
            state, length, inner = int(text["ssm_state_size"]), int(text["conv_kernel"]), heads * size
        else:
            heads, size, groups = (int(text[name]) for name in ("mamba_n_heads", "mamba_d_head", "mamba_n_groups"))
            state, length = int(text["mamba_d_state"]), int(text["mamba_d_conv"])
            inner = int(text.get("mamba_d_ssm") or int(text["mamba_expand"]) * int(text["hidden_size"]))
        if groups % self.n_gpu:
            groups = self.n_gpu
        return heads, size, state, inner + 2 * groups * state, length
