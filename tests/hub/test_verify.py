"""`verify`: every file against the hub's checksums; what is damaged is not served and is fetched again."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import WeightsError
from service.weights import download, download_process, manifest, store
from service.weights.progress import Progress
from tests.fakes.hub import Hub

from .conftest import COMMIT, READ, SHARDS, SPEC, contents

pytestmark = pytest.mark.usefixtures("here")
SHARD = "model-00002-of-00004.safetensors"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetch in this process: a child would import the client for a second."""
    monkeypatch.setattr(download_process, "download_in_child", download.download)


def test_verify_of_good_files_returns_nothing_and_makes_no_request(hub: Hub) -> None:
    """The manifest has the checksums."""
    store.fetch(SPEC)
    before, reports = len(hub.requests), []

    def note(progress: Progress) -> None:
        reports.append(progress)

    assert store.verify(SPEC, on_progress=note) == []
    assert len(hub.requests) == before
    total = sum(map(len, READ.values()))
    assert reports[-1] == Progress("org/mine", total, total, len(READ), len(READ), "verifying")


@pytest.mark.parametrize("path", [SHARD, "config.json"])
def test_verify_finds_a_flipped_bit_and_ensure_repairs_it(hub: Hub, path: str) -> None:
    """From then on the model is not found, until that one file has been fetched again."""
    directory = store.fetch(SPEC).model
    (directory / path).resolve().write_bytes(READ[path][:-1] + b"~")
    assert store.find(SPEC)  # sizes are right
    (sentence,) = store.verify(SPEC)
    assert sentence.startswith(f"{path} of org/mine is damaged")
    assert store.find(SPEC) is None
    hub.requests.clear()

    assert contents(store.ensure(SPEC).model) == READ
    assert len(hub.downloads()) == len(hub.downloads(path)) == 1
    assert store.verify(SPEC) == []


def test_verify_finds_missing_and_torn_files(hub: Hub) -> None:
    """A link without content and a file that is too short; `find` rejects both by itself."""
    directory = store.fetch(SPEC).model
    (directory / "tokenizer.json").resolve().unlink()
    torn = (directory / SHARD).resolve()
    torn.write_bytes(SHARDS[SHARD][:1000])
    assert store.find(SPEC) is None

    assert sorted(sentence.partition(".")[0] for sentence in store.verify(SPEC)) == [
        "model-00002-of-00004",
        "tokenizer",
    ]
    assert contents(store.ensure(SPEC).model) == READ


def test_verify_of_what_another_program_downloaded_asks_the_hub(hub: Hub, cache: Path) -> None:
    """The hub has the checksums; afterwards there is a manifest, or a damaged file is not served."""
    from huggingface_hub import snapshot_download

    directory = Path(snapshot_download("org/mine", revision=COMMIT, endpoint=hub.url, cache_dir=cache))
    assert store.verify(SPEC) == []
    assert manifest.read("org/mine", COMMIT)
    manifest.remove("org/mine", COMMIT)
    (directory / SHARD).resolve().write_bytes(bytes(len(SHARDS[SHARD])))
    assert store.find(SPEC)
    assert len(store.verify(SPEC)) == 1
    assert store.find(SPEC) is None


def test_verify_of_what_another_program_downloaded_fails_without_a_hub(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the hub has the checksums."""
    from huggingface_hub import snapshot_download

    snapshot_download("org/mine", revision=COMMIT, endpoint=hub.url, cache_dir=cache)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"cannot be fetched from http://127\.0\.0\.1:9"):
        store.verify(SPEC)


def test_verify_of_a_model_that_is_not_in_the_cache_names_it(hub: Hub) -> None:
    """There is no file to read."""
    assert store.verify(SPEC) == [f"org/mine at revision {COMMIT} is not in the cache."]
