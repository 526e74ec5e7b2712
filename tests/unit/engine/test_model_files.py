"""What a model's files say: context, KV cache, template; and nothing where they are missing or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.engine.model_files import ModelFiles

QWEN3 = {
    "model_type": "qwen3",
    "max_position_embeddings": 40960,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 1024,
}


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (QWEN3, 40960),
        ({"text_config": QWEN3, "model_type": "qwen3_vl"}, 40960),
        (QWEN3 | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 81920),
        (QWEN3 | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, 40960),
        (QWEN3 | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 40960),
        (QWEN3 | {"model_type": "gemma3", "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 40960),
        (QWEN3 | {"rope_scaling": None}, 40960),
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": "many"}, None),
        ({}, None),
    ],
)
def test_context_is_what_vllm_would_take(config: dict[str, Any], length: int | None) -> None:
    """The smallest of the fields that it reads, scaled as it scales."""
    assert ModelFiles(config).max_model_len == length


def test_files_of_a_directory_are_read(tmp_path: Path) -> None:
    """Configuration, template, and the weights' size."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ tools }}"}))
    for name in ("a.safetensors", "b.safetensors", "c.bin"):
        (tmp_path / name).write_bytes(b"12345")
    files = ModelFiles.read(tmp_path)
    assert (files.family, files.chat_template, files.weights_bytes) == ("qwen3", "{{ tools }}", 10)


def test_template_for_tools_is_taken_before_others(tmp_path: Path) -> None:
    """As transformers chooses: the entry's, one for tools, the file, the tokenizer's list."""
    named = [{"name": "default", "template": "default"}, {"name": "tool_use", "template": "listed"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ModelFiles.read(tmp_path).chat_template == "listed"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ModelFiles.read(tmp_path).chat_template == "file"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("for tools")
    assert ModelFiles.read(tmp_path).chat_template == "for tools"
    (tmp_path / "mine.jinja").write_text("mine")
    assert ModelFiles.read(tmp_path, tmp_path / "mine.jinja").chat_template == "mine"


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, "\udce4"])
def test_files_that_are_damaged_say_nothing(tmp_path: Path, content: str) -> None:
    """The engine itself then tells what is wrong."""
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    files = ModelFiles.read(tmp_path)
    assert (files.family, files.chat_template, files.max_model_len, files.kv_cache(2048, 128)) == ("", "", None, None)
