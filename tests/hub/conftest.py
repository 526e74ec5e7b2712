"""A fake hub with one model of several files, an empty cache, and processes that download."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.registry.models import ModelSpec
from tests.fakes.hub import Hub, Repository, serving
from tests.unit.hub_client import cache, point_to  # noqa: F401 - a fixture

from .processes import Downloads

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPEC = ModelSpec(key="mine", hub_id="org/mine", revision=COMMIT)
_NOISE = random.Random(5)  # noqa: S311 - contents of files, the same in every run
SHARDS = {f"model-{n:05}-of-00004.safetensors": _NOISE.randbytes(100_000 * n + n) for n in range(1, 5)}
INDEX = json.dumps({"weight_map": dict(zip("abcd", SHARDS, strict=True))}).encode()
READ = {
    "config.json": b'{"model_type": "qwen3"}',
    "tokenizer.json": _NOISE.randbytes(20_000),
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors.index.json": INDEX,
    "1_Pooling/config.json": b"{}",
    **SHARDS,
}
NOT_READ = {
    ".gitattributes": b"*.safetensors filter=lfs",
    "README.md": b"# A model",
    "modeling_mine.py": b"raise SystemExit",
    "pytorch_model.bin": b"the same again",
    "original/consolidated.00.pth": b"and again",
    "consolidated.safetensors": b"and again",
    "onnx/model.onnx": b"and again",
}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the developer's own variables of the hub."""
    for name in os.environ:
        if name.startswith(("SERVICE_", "HF_", "HUGGING")):
            monkeypatch.delenv(name)


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:  # noqa: F811 - the fixture
    """Run a hub that has the model, the shards on its CDN."""
    model = Repository(COMMIT, {**NOT_READ, **READ}, large=("*.safetensors", "*.bin", "tokenizer.json"))
    with serving(Hub(repositories={"org/mine": model})) as running:
        point_to(running.url, monkeypatch)
        yield running
    assert running.unknown == []


@pytest.fixture(scope="package")
def downloads() -> Iterator[Downloads]:
    """Provide processes that have imported the client already."""
    with Downloads() as server:
        yield server


def contents(directory: Path) -> dict[str, bytes]:
    """Return all files of a snapshot."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
