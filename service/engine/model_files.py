"""What a model's own files say of it: its family, how long a context it was made for, its KV cache, its chat template.

Reads `config.json`, the chat template, and the sizes of the weights; a file that is missing or damaged says nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.engine.cache_layers import cache_layers, text_config
from service.engine.kv_cache import KVCache
from service.errors import UnknownShapeError

# Source: vllm/transformers_utils/model_arch_config_convertor.py of vLLM 0.32.0, derive_max_model_len_and_key
_LENGTHS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions"),
    *("max_sequence_length", "max_seq_length", "seq_len"),
)
# vLLM multiplies the length by `factor` for every other kind. Source: vllm/config/model.py, _get_and_verify_max_len
_SCALED_ALREADY = {"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"}


@dataclass(frozen=True)
class ModelFiles:
    """What the files in a model's directory say.

    Attributes:
        config: `config.json`.
        chat_template: The template of a chat with tools; empty: it has none.
        weights_bytes: Size of the safetensors.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str = ""
    weights_bytes: int = 0

    @classmethod
    def read(cls, directory: Path, chat_template: Path | None = None) -> ModelFiles:
        """Read them; `chat_template` replaces the model's own."""
        template = _text(chat_template) if chat_template else _own_template(directory)
        weights = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        return cls(_object(directory / "config.json"), template, weights)

    @property
    def family(self) -> str:
        """The architecture's name as transformers has it, such as `qwen3_moe`; empty when it is not known."""
        return str(self.config.get("model_type") or "")

    @property
    def max_model_len(self) -> int | None:
        """The longest context that vLLM would take for it; None when the files do not say."""
        text = text_config(self.config)
        lengths = [length for name in _LENGTHS if isinstance(length := text.get(name), int)]
        if not lengths:
            return None
        scaling = text.get("rope_scaling") or text.get("rope_parameters")
        if not isinstance(scaling, dict) or "gemma3" in self.family:
            return min(lengths)
        scaled_already = (scaling.get("rope_type") or scaling.get("type")) in _SCALED_ALREADY
        return int(min(lengths) * (1 if scaled_already else scaling.get("factor") or 1))

    def kv_cache(self, in_flight_tokens: int, block: int) -> KVCache | None:
        """Return what an engine allocates for the KV cache; None: not known."""
        try:
            return KVCache.of(cache_layers(self.config), in_flight_tokens, block=block)
        except UnknownShapeError:
            return None


def _own_template(directory: Path) -> str:
    """Return the template that transformers uses when a chat has tools: a file, or a field of the tokenizer's."""
    for file in ("additional_chat_templates/tool_use.jinja", "chat_template.jinja"):
        if text := _text(directory / file):
            return text
    found = _object(directory / "chat_template.json") or _object(directory / "tokenizer_config.json")
    own = found.get("chat_template")
    if isinstance(own, list):  # several, by name
        named = {part.get("name"): part.get("template") for part in own if isinstance(part, dict)}
        own = named.get("tool_use") or named.get("default")
    return own if isinstance(own, str) else ""


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _object(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(_text(file) or "{}")
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
