"""Fixtures that give the hub's client a cache, a clock and a fake hub."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

from service.registry.models import ModelSpec
from service.weights import huggingface as hub_module
from tests.fakes.hub import Hub, Repository, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPEC = ModelSpec(key="mine", hub_id="org/mine", revision=COMMIT)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode()
FILES = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors.index.json": INDEX} | dict.fromkeys(
    SHARDS, b"numbers"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the hub's client an empty cache, and the address of a hub that does not run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{probe.getsockname()[1]}", monkeypatch)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    return tmp_path / "hf" / "hub"


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clock of the client and of our own retries; return the waits that were requested."""
    waits: list[float] = []
    clock = SimpleNamespace(sleep=waits.append, time=time.time, monotonic=time.monotonic)
    for module in (_http, file_download, hub_module):
        monkeypatch.setattr(module, "time", clock)
    return waits


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this the hub's address; the client read the variable when it was imported."""
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run a hub that has the model; a request that it does not know fails the test."""
    with serving(Hub(repositories={"org/mine": Repository(COMMIT, dict(FILES))})) as running:
        point_to(running.url, monkeypatch)
        yield running
    assert running.unknown == []


def filled(cache: Path, files: dict[str, bytes], hub_id: str = "org/mine") -> Path:
    """Put files into the cache as the hub's client does: blobs, and a snapshot of links to them."""
    root = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    (root / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name, content in files.items():
        (root / "blobs" / f"{name}-blob").write_bytes(content)
        (snapshot / name).symlink_to(root / "blobs" / f"{name}-blob")
    return snapshot
