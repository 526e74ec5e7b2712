"""A manifest counts if its files have their sizes; an unreadable one does not. Where the hub cache is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from service.weights import hub_cache, manifest, store
from service.weights.files import RepositorySpec
from service.weights.manifest import File, Manifest
from tests.unit.hub_client import COMMIT, FILES, SPEC, filled

MANIFEST = Manifest(
    "org/mine", COMMIT, {path: File(len(content), "git:abc") for path, content in FILES.items()}, frozenset(FILES)
)


def test_manifest_is_read_as_it_was_written(cache: Path) -> None:
    """Beside the repository, whole or partial, and gone with it."""
    manifest.write(MANIFEST, partial=True)
    assert manifest.is_partial("org/mine", COMMIT)
    manifest.write(MANIFEST)

    assert manifest.read("org/mine", COMMIT) == MANIFEST == manifest.read_all_verified("org/mine", COMMIT)
    assert not manifest.is_partial("org/mine", COMMIT)
    assert list(manifest.list_managed()) == [("org/mine", COMMIT)]
    assert [path.relative_to(cache) for path in cache.rglob("*.json")] == [
        Path("models--org--mine", "vllm-service", f"{COMMIT}.json")
    ]


def test_manifest_of_files_with_another_size_does_not_count(cache: Path) -> None:
    """Another program wrote into the cache, or a disk lost unwritten data."""
    snapshot = filled(cache, FILES)
    manifest.write(MANIFEST)
    assert store.find(SPEC)
    (snapshot / "tokenizer.json").resolve().write_bytes(b"{} ")

    assert store.find(SPEC) is None


def test_partial_manifest_keeps_the_files_from_being_served(cache: Path) -> None:
    """All files look complete, but are not verified yet."""
    filled(cache, FILES)
    assert store.find(SPEC)
    manifest.write(Manifest("org/mine", COMMIT, MANIFEST.files), partial=True)

    assert store.find(SPEC) is None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"version": 2}', '{"version": 1, "files": {"a": 1}}'])
def test_manifest_that_cannot_be_read_is_none(cache: Path, content: str) -> None:
    """It is cut short, or of a later version."""
    manifest.write(MANIFEST)
    path = next(cache.rglob("*.json"))
    path.write_text(content)

    assert manifest.read("org/mine", COMMIT) is None
    assert list(manifest.list_managed()) == []


def test_manifest_is_complete_only_for_what_was_fetched(cache: Path) -> None:
    """Another entry of the same repository may need more files."""
    filled(cache, FILES)
    part = Manifest("org/mine", COMMIT, MANIFEST.files, MANIFEST.verified - {"tokenizer.json"})
    manifest.write(part)

    assert not part.is_complete_for(RepositorySpec("org/mine", COMMIT))
    assert store.find(SPEC.model_copy(update={"ignore_patterns": ("tokenizer.json",)}))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "{home}/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x", "HF_HOME": "~/hf"}, "{home}/hf/hub"),
        ({"HF_HOME": "/h", "HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
        ({"HF_HOME": "/h", "HF_HUB_CACHE": "$HOME/new", "HUGGINGFACE_HUB_CACHE": "/old"}, "{home}/new"),
    ],
)
def test_hub_cache_is_where_the_client_has_it(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service reads the variables itself, without importing the client, with the same result."""
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    asks = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    client = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True, check=True).stdout.strip()

    assert str(hub_cache.hub_cache()) == expected.format(home=Path.home()) == client


def test_client_still_has_the_constant_that_the_download_sets() -> None:
    """No environment variable sets the size of the pieces in which it reads files."""
    assert isinstance(constants.DOWNLOAD_CHUNK_SIZE, int)
