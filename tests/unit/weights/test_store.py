"""Weights that are complete in the cache are used without a connection."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.errors import WeightsError
from service.registry.models import ModelSpec, Registry
from service.weights import store
from tests.fakes.hub import Hub
from tests.unit.hub_client import COMMIT, FILES, SHARDS, SPEC, filled

pytestmark = pytest.mark.usefixtures("cache", "slept")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail on any attempt to connect."""

    def connect(_: socket.socket, address: Any) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a name was looked up"))


def test_weights_complete_in_the_cache_are_found_with_no_connection(cache: Path, no_network: None) -> None:
    """An outage of the hub cannot stop a boot."""
    snapshot = filled(cache, FILES)

    assert store.find(SPEC) == store.ensure(SPEC) == store.Weights(snapshot)


def test_weights_in_one_file_are_found(cache: Path, no_network: None) -> None:
    """Small models have no index."""
    snapshot = filled(cache, {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"numbers"})

    assert store.find(SPEC) == store.Weights(snapshot)


@pytest.mark.parametrize("lost", ["config.json", *SHARDS])
def test_weights_without_a_file_that_the_engine_reads_are_not_found(cache: Path, no_network: None, lost: str) -> None:
    """A partial download is not a model."""
    filled(cache, {name: content for name, content in FILES.items() if name != lost})

    assert store.find(SPEC) is None


def test_weights_with_a_shard_and_no_index_are_not_found(cache: Path, no_network: None) -> None:
    """The name says `00001-of-00002`: the index and the other shard are still missing."""
    filled(cache, {"config.json": b"{}", "tokenizer.json": b"{}", SHARDS[0]: b"numbers"})

    assert store.find(SPEC) is None


def test_weights_whose_blob_was_deleted_are_not_found(cache: Path, no_network: None) -> None:
    """A link without a target does not count."""
    snapshot = filled(cache, FILES)
    (snapshot / SHARDS[1]).resolve().unlink()

    assert store.find(SPEC) is None


def test_weights_of_another_revision_are_not_found(cache: Path, no_network: None) -> None:
    """Only the pinned commit is served."""
    filled(cache, FILES)

    assert store.find(SPEC.model_copy(update={"revision": "f" * 40})) is None


def test_weights_of_an_entry_with_a_draft_need_both(cache: Path, no_network: None) -> None:
    """They are found only with the draft model."""
    speculative = {"method": "eagle3", "num_speculative_tokens": 7, "hub_id": "org/draft", "revision": COMMIT}
    spec = ModelSpec.model_validate({**SPEC.model_dump(), "speculative": speculative})
    snapshot = filled(cache, FILES)
    assert store.find(spec) is None

    draft = filled(cache, FILES, "org/draft")
    assert store.find(spec) == store.Weights(snapshot, draft)


def test_weights_of_the_tiny_model_are_in_the_package(no_network: None) -> None:
    """In their directory, without hub and cache."""
    spec = Registry.load().specs["tiny"]

    assert store.ensure(spec) == store.Weights(spec.directory)  # type: ignore[arg-type]


def test_weights_directory_without_a_configuration_is_named(tmp_path: Path) -> None:
    """The error has the directory, the model and what to give instead."""
    with pytest.raises(WeightsError, match=f"'{tmp_path}' of model 'here' has no config.json"):
        store.find(ModelSpec(key="here", path=str(tmp_path)))


def test_size_of_weights_in_the_cache_is_that_of_the_files_that_the_engine_reads(cache: Path, no_network: None) -> None:
    """Without a connection; what only people look at counts nothing."""
    filled(cache, FILES | {"README.md": b"x" * 1000})

    assert store.size_gb(SPEC) == sum(map(len, FILES.values())) / 1e9


def test_size_of_weights_in_a_directory_leaves_out_what_lies_deeper(tmp_path: Path) -> None:
    """A training run keeps its checkpoints there, which the engine does not read."""
    (tmp_path / "checkpoint-500").mkdir()
    for name, size in {"config.json": 2, "model.safetensors": 5, "checkpoint-500/model.safetensors": 5}.items():
        (tmp_path / name).write_bytes(b"x" * size)

    assert store.size_gb(ModelSpec(key="mine", path=str(tmp_path))) == 7 / 1e9


def test_size_of_weights_that_are_missing_is_what_the_hub_lists(hub: Hub, cache: Path) -> None:
    """Nothing is downloaded for it."""
    hub.repositories["org/mine"].files |= {"pytorch_model.bin": b"x" * 1000, "original/a.safetensors": b"x" * 1000}

    assert store.size_gb(SPEC) == sum(map(len, FILES.values())) / 1e9
    assert not list(cache.rglob("*.safetensors"))


def test_weights_in_hf_home_are_found_by_a_new_process(tmp_path: Path) -> None:
    """The variables are those of huggingface_hub."""
    snapshot = filled(tmp_path / "elsewhere" / "hub", FILES)
    program = (
        "import socket\ndef no(*_): raise SystemExit('connected')\nsocket.socket.connect = no\n"
        "from service.weights import store as weights; from service.registry.models import ModelSpec\n"
        f"print(weights.find(ModelSpec(key='mine', hub_id='org/mine', revision='{COMMIT}')).model)"
    )
    env = os.environ | {"HF_HOME": str(tmp_path / "elsewhere"), "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == str(snapshot)
