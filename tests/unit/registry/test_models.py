"""The built-in registry: its models, and every way to name one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from service.errors import UnknownModelError
from service.registry.gpus import GPUS
from service.registry.models import ModelSpec, Registry, looks_like_a_source, unregistered

REGISTRY = Registry.load()
SPECS = REGISTRY.specs
# The seeds' models, Qwen3-0.6B and the strong ones of 2026, each with its pinned revision (models.md, part A1).
PINNED = {
    "Qwen/Qwen3-8B-FP8": "220b46e3b2180893580a4454f21f22d3ebb187d3",
    "meta-llama/Llama-3.1-8B-Instruct": "0e9e39f249a16976918f6564b8830bc894c89659",
    "RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8": "12fd6884d2585dd4d020373e7f39f74507b31866",
    "google/gemma-3-12b-it": "96b6f1eccf38110c56df3a15bffe176da04bfd80",
    "google/gemma-3-27b-it": "005ad3404e59d6023443cb575daa05336842228a",
    "Qwen/Qwen3-VL-30B-A3B-Instruct": "9c4b90e1e4ba969fd3b5378b57d966d725f1b86c",
    "Qwen/Qwen3-4B-Instruct-2507": "cdbee75f17c01a7cc42f958dc650907174af0554",
    "Qwen/Qwen3-30B-A3B-Instruct-2507": "0d7cf23991f47feeb3a57ecb4c9cee8ea4a17bfe",
    "Qwen/Qwen3-235B-A22B-Instruct-2507-FP8": "e156cb4efae43fbee1a1ab073f946a1377e6b969",
    "openai/gpt-oss-20b": "6cee5e81ee83917806bbde320786a8fb61efebee",
    "openai/gpt-oss-120b": "b5c939de8f754692c1647ca79fbf85e8c1e70f8a",
    "Qwen/Qwen3-0.6B": "c1899de289a04d12100db370d81485cdf75e47ca",
    "Qwen/Qwen3.8-27B-FP8": "017b9c7af6b5689d5dd426a76e0bc077eb5ca20a",
    "Qwen/Qwen3.6-35B-A3B-FP8": "95a723d08a9490559dae23d0cff1d9466213d989",
    "google/gemma-4-26B-A4B-it": "47b6801b24d15ff9bcd8c96dfaea0be9ed3a0301",
}
# No public source gives a revision of these (models.md): the newest is served until one is known.
UNPINNED_DRAFTS = {"RedHatAI/gpt-oss-20b-speculator.eagle3", "RedHatAI/gpt-oss-120b-speculator.eagle3"}


@pytest.mark.parametrize(("hub_id", "revision"), PINNED.items())
def test_registry_serves_the_model_at_its_pinned_revision(hub_id: str, revision: str) -> None:
    """All that the seeds describe, at the revision that was looked up."""
    spec = REGISTRY.resolve(hub_id).spec

    assert (spec.hub_id, spec.revision) == (hub_id, revision)


@pytest.mark.parametrize("spec", [spec for spec in SPECS.values() if spec.hub_id], ids=lambda spec: spec.key)
def test_registry_entry_from_the_hub_pins_a_commit(spec: ModelSpec) -> None:
    """A branch's name would serve another model tomorrow."""
    assert re.fullmatch("[0-9a-f]{40}", spec.revision or "")


def test_registry_drafts_without_a_pin_are_the_two_known() -> None:
    """A draft whose revision is known pins it."""
    drafts = [spec.speculative for spec in SPECS.values() if spec.speculative]

    assert {draft.hub_id for draft in drafts if draft.hub_id and not draft.revision} <= UNPINNED_DRAFTS


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.key)
def test_registry_entry_fits_the_memory_of_its_gpus(spec: ModelSpec) -> None:
    """Weights, and a tenth of the memory for the KV cache, on the GPUs that the entry names."""
    assert spec.weights_gb is not None
    assert spec.weights_gb <= 0.9 * spec.tier.gpu.memory_gb * spec.n_gpu


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.key)
def test_registry_entry_says_what_the_table_shows(spec: ModelSpec) -> None:
    """Price and context are there for every model, and a tool parser for those that chat."""
    assert spec.tier.dollars_per_hour > 0
    assert spec.max_model_len
    assert bool(spec.tool_call_parser) == (spec.task == "generate")


def test_registry_gated_models_are_those_with_a_licence_to_accept() -> None:
    """Meta's and Google's of the third generation; the rest downloads without a token."""
    gated = {spec.hub_id for spec in SPECS.values() if spec.gated}

    assert gated == {"meta-llama/Llama-3.1-8B-Instruct", "google/gemma-3-12b-it", "google/gemma-3-27b-it"}


@pytest.mark.parametrize("key", ["gpt-oss-20b", "gpt-oss-120b"])
def test_registry_gpt_oss_has_all_its_accelerations(key: str) -> None:
    """EAGLE3 with seven tokens, FP8 KV cache, FlashInfer's MoE, asynchronous scheduling, two fusion passes."""
    spec = SPECS[key]

    assert spec.speculative is not None
    assert (spec.speculative.method, spec.speculative.num_speculative_tokens) == ("eagle3", 7)
    assert spec.speculative.hub_id == f"RedHatAI/{key}-speculator.eagle3"
    assert (spec.kv_cache_dtype, spec.async_scheduling) == ("fp8", True)
    assert "flashinfer" in (spec.moe_backend or "")
    assert set(spec.fusion_passes) == {"fuse_allreduce_rms", "eliminate_noops"}
    assert {"original/*", "metal/*"} <= set(spec.ignore_patterns)  # 27 of 41 GB that nobody reads


def test_registry_tiny_model_lies_in_the_package() -> None:
    """It is served with no hub in reach."""
    directory = SPECS["tiny"].directory

    assert directory is not None
    assert (directory / "config.json").is_file()


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.key)
def test_registry_resolves_key_hub_id_and_alias_in_any_case(spec: ModelSpec) -> None:
    """Clients write hub ids as they please."""
    for name in spec.names:
        for spelled in (name, name.upper(), name.lower()):
            assert REGISTRY.resolve(spelled).spec is spec


@pytest.mark.parametrize("gpu", sorted(GPUS))
@pytest.mark.parametrize("key", sorted(SPECS))
def test_registry_resolves_a_key_with_a_gpu_suffix(key: str, gpu: str) -> None:
    """`gemma-3-12b-h100`, `qwen3-8b-a100-40gb`, `qwen3-8b-h100-only`, for every pair."""
    choice = REGISTRY.resolve(f"{key}-{GPUS[gpu].slug}")

    assert (choice.spec, choice.gpu) == (SPECS[key], GPUS[gpu])


@pytest.mark.parametrize("name", ["gemma-3-27b-a100", "gemma-3-27b-a100-80gb", "google/Gemma-3-27b-it-A100-80GB"])
def test_registry_resolves_the_80_gb_a100_by_its_short_and_its_full_name(name: str) -> None:
    """Both mean one tier."""
    choice = REGISTRY.resolve(name)

    assert (choice.spec.key, choice.gpu) == ("gemma-3-27b", GPUS["A100-80GB"])


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B-FP8-H200", "qwen/qwen3-8b-fp8-h200"])
def test_registry_resolves_a_hub_id_with_a_gpu_suffix(name: str) -> None:
    """Any of the names may end in a GPU."""
    choice = REGISTRY.resolve(name)

    assert (choice.spec.key, choice.gpu) == ("qwen3-8b", GPUS["H200"])


def test_registry_resolves_llm_to_the_default_model() -> None:
    """`llm` is whatever the service's default is, by any of its names."""
    assert REGISTRY.resolve("llm", "gemma-3-12b").spec.key == "gemma-3-12b"
    assert REGISTRY.resolve("LLM", "google/gemma-3-12b-it").spec.key == "gemma-3-12b"


def test_registry_resolves_llm_with_a_gpu_suffix() -> None:
    """`llm` is a name like the others: `llm-h200` is the default model there."""
    choice = REGISTRY.resolve("llm-h200", "gemma-3-12b")

    assert (choice.spec.key, choice.gpu) == ("gemma-3-12b", GPUS["H200"])


@pytest.mark.parametrize("name", ["llm", "nothing-like-it", ""])
def test_registry_without_the_name_raises(name: str) -> None:
    """`llm` without a default model is unknown too."""
    with pytest.raises(UnknownModelError):
        REGISTRY.resolve(name)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("qwen3-8", "qwen3-8b"),
        ("gema-3-12b", "gemma-3-12b"),
        ("gpt-oss-20", "gpt-oss-20b"),
        ("qwen/qwen3-8b-fp", "Qwen/Qwen3-8B-FP8"),
    ],
)
def test_registry_unknown_name_offers_the_nearest_and_all_keys(name: str, nearest: str) -> None:
    """The error has the value, the nearest name, the list, and how to add a model."""
    with pytest.raises(UnknownModelError) as caught:
        REGISTRY.resolve(name)

    assert str(caught.value).startswith(f"Unknown model '{name}'. Did you mean '{nearest}'?")
    assert all(key in str(caught.value) for key in SPECS)
    assert "SERVICE_MODELS_FILE" in str(caught.value)


def test_registry_unknown_gpu_suffix_is_an_unknown_model() -> None:
    """`qwen3-8b-h300` names no model."""
    with pytest.raises(UnknownModelError, match="qwen3-8b-h300"):
        REGISTRY.resolve("qwen3-8b-h300")


def test_unregistered_hub_id_becomes_an_entry_of_its_own() -> None:
    """VLLM's defaults, the newest revision, a key made of the repository's name."""
    spec = unregistered("Org/Some_Model-7B")

    assert (spec.key, spec.hub_id, spec.revision) == ("some-model-7b", "Org/Some_Model-7B", None)


def test_unregistered_directory_becomes_an_entry_of_its_own(tmp_path: Path) -> None:
    """A directory with a config.json is a model."""
    directory = tmp_path / "My Model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")

    assert looks_like_a_source(str(directory))
    spec = unregistered(str(directory))
    assert (spec.key, spec.directory, spec.hub_id) == ("my-model", directory, None)


@pytest.mark.parametrize(("name", "does"), [("org/name", True), ("qwen3-8b", False), ("a/b/c", False), ("", False)])
def test_source_is_told_from_a_mistyped_key(name: str, does: bool) -> None:
    """One slash makes a hub id; without one it is a key."""
    assert looks_like_a_source(name) is does


@pytest.mark.parametrize("name", ["org/", "/name", "org/a b", "./name", "org/na+me", "org/..", "a/模"])
def test_unregistered_name_that_no_hub_id_can_be_is_refused_in_words(name: str) -> None:
    """Every name is served, or refused with an error that contains it, never with a library's traceback."""
    if looks_like_a_source(name):
        with pytest.raises(UnknownModelError, match=re.escape(name)):
            unregistered(name)
