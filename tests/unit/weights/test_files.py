"""Which files of a repository are fetched: those that the engine reads."""

from __future__ import annotations

import pytest

from service.errors import WeightsError
from service.registry.models import ModelSpec
from service.weights.files import RepositorySpec, check_safetensors, model_repository, select_files

TENSORS = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    "others",
    [
        ["pytorch_model.bin", "model.pth", "training_args.bin", "x.pt"],
        ["original/consolidated.00.pth", "original/params.json", "metal/model.bin", "onnx/a.json"],
        ["consolidated.safetensors", "consolidated.safetensors.index.json"],
        ["model.gguf", "model.onnx", "tf_model.h5", "flax_model.msgpack", "rust_model.ot"],
        ["README.md", ".gitattributes", "figures/a.png", "modeling_mine.py"],
    ],
)
def test_selection_leaves_out_what_the_engine_does_not_read(others: list[str]) -> None:
    """The same weights in other formats, second trees, and files for people."""
    assert select_files([*TENSORS, *others], RepositorySpec("o/m")) == TENSORS


@pytest.mark.parametrize(
    "others",
    [
        ["tokenizer.json", "tokenizer.model", "vocab.txt", "merges.txt", "chat_template.jinja"],
        ["preprocessor_config.json", "1_Pooling/config.json", "tiktoken.tiktoken", "hf_quant_config.json"],
    ],
)
def test_selection_keeps_what_a_tokenizer_or_processor_may_read(others: list[str]) -> None:
    """Every file that is not known to be for another program."""
    assert select_files([*TENSORS, *others], RepositorySpec("o/m")) == [*TENSORS, *others]


def test_selection_without_safetensors_leaves_pickles_out() -> None:
    """Although the repository has no other weights."""
    assert select_files(["config.json", "pytorch_model.bin", "m.onnx"], RepositorySpec("o/m")) == ["config.json"]


@pytest.mark.parametrize(
    "paths",
    [
        ["config.json", "pytorch_model.bin"],
        ["config.json", "model.pt", "original/model.safetensors"],
        ["config.json", "model-Q4_K_M.gguf"],
        ["adapter_config.json", "adapter_model.bin", "other.safetensors"],
        [*TENSORS, "modules.json", "2_Dense/config.json", "2_Dense/pytorch_model.bin"],
    ],
)
def test_weights_in_pickles_alone_are_refused(paths: list[str]) -> None:
    """Of a model, of an adapter, and of a part of a sentence transformer; GGUF too."""
    with pytest.raises(WeightsError, match="'o/m' has weights that are not in the safetensors format"):
        check_safetensors(paths, "'o/m'")


@pytest.mark.parametrize(
    "paths",
    [
        [*TENSORS, "training_args.bin", "pytorch_model.bin", "model.gguf"],
        ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"],
        [*TENSORS, "modules.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin"],
        [*TENSORS, "checkpoint-500/pytorch_model.bin"],
        ["config.json"],
    ],
)
def test_weights_in_safetensors_pass_whatever_lies_beside_them(paths: list[str]) -> None:
    """Safetensors are read where there are any; a directory without weights is the engine's to refuse."""
    check_safetensors(paths, "'o/m'")


def test_selection_of_consolidated_files_alone_keeps_them() -> None:
    """A repository in Mistral's layout only."""
    files = ["params.json", "tekken.json", "consolidated.safetensors"]

    assert select_files(files, RepositorySpec("o/m")) == files


def test_selection_leaves_out_what_the_entry_names() -> None:
    """By path, by name, and by directory."""
    files = ["a.json", "metal/x.json", "deep/metal/y.json", "b.json"]

    assert select_files(files, RepositorySpec("o/m", None, ("metal/", "b.json"))) == ["a.json"]


@pytest.mark.parametrize(
    ("argument", "path"),
    [("--trust-remote-code", "modeling_mine.py"), ("--load-format=mistral", "consolidated.safetensors")],
)
def test_selection_keeps_what_the_entrys_arguments_need(argument: str, path: str) -> None:
    """Code is fetched for an entry that runs it, and the layout that its loader reads."""
    repository = model_repository(ModelSpec(key="m", hub_id="o/m", revision="a" * 40, extra_args=(argument,)))

    assert repository is not None
    assert select_files([*TENSORS, path], repository) == [*TENSORS, path]
    assert select_files([*TENSORS, path], RepositorySpec("o/m")) == TENSORS
