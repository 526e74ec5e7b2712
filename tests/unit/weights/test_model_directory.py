"""What of a directory is uploaded, and what is refused: one sentence with the file, and what to do."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from service.errors import UsageError
from service.weights import model_directory

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tensors(count: int = 4) -> bytes:
    """Return a safetensors file with one tensor of so many bytes."""
    header = json.dumps({"t": {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(count)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A whole model."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(tensors())
    return directory


def sharded(directory: Path) -> None:
    """Turn the model into one of two shards."""
    (directory / "model.safetensors").unlink()
    for shard in SHARDS:
        (directory / shard).write_bytes(tensors())
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))})
    )


def test_model_directory_leaves_out_what_is_not_served(model: Path) -> None:
    """Pickles beside the weights, code, hidden files, what a training run keeps; parts in directories are served."""
    for name in (
        *("training_args.bin", "optimizer.pt", "modeling.py", "README.md", ".gitattributes", ".cache/x"),
        *("checkpoint-500/model.safetensors", "runs/events", "1_Pooling/config.json"),
    ):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("x")
    found = model_directory.read(model)
    served = ["1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json"]
    assert (list(found.files), found.is_adapter) == (served, False)
    assert found.files["model.safetensors"] == len(tensors())
    assert found.left_out == (
        *(".cache/", ".gitattributes", "README.md", "checkpoint-500/", "modeling.py", "optimizer.pt"),
        *("runs/", "training_args.bin"),
    )


def test_model_directory_of_shards_is_whole_with_its_index(model: Path) -> None:
    """All that the index names."""
    sharded(model)
    assert set(SHARDS) < model_directory.read(model).files.keys()


def test_model_directory_with_an_adapter_needs_no_tokenizer(tmp_path: Path) -> None:
    """PEFT's two files; beside a model's weights they are not what is meant."""
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "rank_pattern": {"q_proj": 16}}')
    (tmp_path / "adapter_model.safetensors").write_bytes(tensors())
    assert (model_directory.read(tmp_path).is_adapter, model_directory.read(tmp_path).lora_rank) == (True, 16)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(tensors())
    assert not model_directory.read(tmp_path).is_adapter


def test_model_directory_may_have_links_inside_and_be_one(model: Path, tmp_path: Path) -> None:
    """What they point to is uploaded."""
    (model / "model.safetensors").rename(model / "numbers.safetensors")
    (model / "model.safetensors").symlink_to("numbers.safetensors")
    (tmp_path / "link").symlink_to(model)
    assert "model.safetensors" in model_directory.read(tmp_path / "link").files


def _without(name: str) -> Callable[[Path], object]:
    return lambda model: (model / name).unlink()


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes(content)


def _only_pickles(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def _adapter_of_pickles(model: Path) -> None:
    _only_pickles(model)
    (model / "adapter_config.json").write_text("{}")
    (model / "pytorch_model.bin").rename(model / "adapter_model.bin")


def _adapter(config: str) -> Callable[[Path], None]:
    def arrange(model: Path) -> None:
        (model / "adapter_config.json").write_text(config)
        (model / "model.safetensors").rename(model / "adapter_model.safetensors")

    return arrange


def _shards(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def arrange(model: Path) -> None:
        sharded(model)
        change(model)

    return arrange


def _link(name: str, target: str) -> Callable[[Path], None]:
    def arrange(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(target)

    return arrange


def _pipe(model: Path) -> None:
    os.mkfifo(model / "vocab.json")


REFUSED = {
    "no config": (_without("config.json"), "has neither config.json nor adapter_config.json."),
    "config is no JSON": (_write("config.json", b'{"a": '), "config.json' is no JSON: "),
    "config is no table": (_write("config.json", b"[]"), "config.json' holds no table."),
    "no tokenizer": (_without("tokenizer.json"), "has no tokenizer: none of tokenizer.json, "),
    "no weights": (_without("model.safetensors"), "has no weights: no *.safetensors."),
    "pickles": (_only_pickles, "has weights that are not in the safetensors format. Pickles, which may hold code, "),
    "adapter of pickles": (_adapter_of_pickles, "has weights that are not in the safetensors format."),
    "adapter without a rank": (_adapter('{"r": 0}'), "adapter_config.json' has no rank: r is 0."),
    "adapter of a rank that vLLM lacks": (
        _adapter('{"r": 8, "rank_pattern": {"q_proj": 513}}'),
        "adapter_config.json' has rank 513, and vLLM serves adapters up to rank 512.",
    ),
    "weights cut": (_write("model.safetensors", tensors()[:-1]), "was not written whole: it has "),
    "weights empty": (_write("model.safetensors", b""), "was not written whole: it has 0 bytes, and it has no header."),
    "weights are text": (_write("model.safetensors", b"version https://git-lfs"), "and it has no header."),
    "header of another kind": (_write("model.safetensors", struct.pack("<Q", 2) + b"[]"), "and it has no header."),
    "no index": (_shards(_without("model.safetensors.index.json")), f"has the shard {SHARDS[0]}, but no model."),
    "index cut": (_shards(_write("model.safetensors.index.json", b'{"weight_map": {"a"')), "is no JSON: "),
    "index empty": (_shards(_write("model.safetensors.index.json", b"{}")), "has no table weight_map: "),
    "shard missing": (_shards(_without(SHARDS[1])), f"lacks {SHARDS[1]}, which model.safetensors.index.json names."),
    "link out": (_link("tokenizer.json", "../tokenizer.json"), "tokenizer.json', outside of the directory."),
    "directory linked": (_link("1_Pooling", ".."), "', outside of the directory."),
    "link to nothing": (_link("vocab.json", "nothing"), "vocab.json' is no file."),
    "pipe": (_pipe, "vocab.json' is no file."),
}


@pytest.mark.parametrize("why", REFUSED)
def test_model_directory_that_is_not_whole_is_refused(model: Path, why: str) -> None:
    """The sentence names what it is, and the hint what to do."""
    arrange, sentence = REFUSED[why]
    arrange(model)
    (model.parent / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError) as caught:
        model_directory.read(model)
    assert sentence in caught.value.message
    assert str(model) in caught.value.message
    assert caught.value.hint


def test_model_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    """A file, or nothing."""
    with pytest.raises(UsageError, match=r"nothing' is no directory\."):
        model_directory.read(tmp_path / "nothing")
