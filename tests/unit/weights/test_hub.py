"""A second hub is one class and one entry in `HUBS`: everything that is done with weights works with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from service.errors import UsageError, WeightsError
from service.registry.models import ModelSpec, Registry
from service.weights import download, download_process, hub, hub_cache, outdated, revisions, store
from service.weights.files import RepositorySpec
from service.weights.manifest import File, Manifest
from service.weights.prefetch import ModelReady, PrefetchRequest, prefetch
from tests.unit.hub_client import COMMIT, FILES

HUB_ID = "memory:org/mine"
SPEC = ModelSpec(key="mine", hub_id=HUB_ID, revision=COMMIT)
LOOSE = ModelSpec(key="loose", hub_id=HUB_ID)


class MemoryHub:
    """A hub with one repository, in memory."""

    url = "memory"

    def __init__(self) -> None:
        self.files = dict(FILES)
        self.downloaded: list[str] = []

    def why_unreachable(self) -> None:
        """Answer always."""

    def resolve(self, hub_id: str) -> str:
        """Return the only commit."""
        if hub_id != HUB_ID:
            raise WeightsError(f"There is no {hub_id}.")
        return COMMIT

    def list_files(self, repository: RepositorySpec) -> Manifest:
        """Return the files with their checksums."""
        revision = self.resolve(repository.hub_id)
        sums = {path: hashlib.sha256(content).hexdigest() for path, content in self.files.items()}
        files = {path: File(len(self.files[path]), f"sha256:{digest}") for path, digest in sums.items()}
        return Manifest(repository.hub_id, revision, files)

    def download(
        self, repository: RepositorySpec, revision: str, paths: Sequence[str], received_bytes: Callable[[], int]
    ) -> None:
        """Write the files."""
        directory = hub_cache.snapshot(repository.hub_id, revision)
        directory.mkdir(parents=True, exist_ok=True)
        for path in paths:
            before = received_bytes()
            (directory / path).write_bytes(self.files[path])
            assert received_bytes() == before + len(self.files[path])
            self.downloaded.append(path)


@pytest.fixture
def memory_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryHub:
    """Register the second hub; Hugging Face's is unreachable, and downloads happen in this process."""
    memory_hub = MemoryHub()
    monkeypatch.setitem(hub.HUBS, "memory", memory_hub)
    monkeypatch.setattr(download_process, "download_in_child", download.download)
    return memory_hub


def test_second_hub_is_fetched_from_and_verified(memory_hub: MemoryHub) -> None:
    """Once; a damaged file is found and fetched again."""
    found = store.ensure(SPEC)
    assert {path.name: path.read_bytes() for path in found.model.iterdir()} == FILES
    assert sorted(memory_hub.downloaded) == sorted(FILES)
    assert store.find(SPEC) == store.ensure(SPEC) == store.Weights(found.model)

    (found.model / "config.json").write_bytes(b"[]")
    (sentence,) = store.verify(SPEC)
    assert sentence.startswith("config.json of memory:org/mine is damaged")
    assert store.find(SPEC) is None
    store.fetch(SPEC)
    assert memory_hub.downloaded.count("config.json") == 2
    assert store.verify(SPEC) == []


def test_second_hub_that_sends_something_else_than_it_lists_is_refused(memory_hub: MemoryHub) -> None:
    """The checksums are compared, whichever hub it is."""
    listed = memory_hub.list_files(RepositorySpec(HUB_ID))
    memory_hub.files["config.json"] = b"[]"
    memory_hub.list_files = lambda _: listed  # type: ignore[method-assign]
    with pytest.raises(WeightsError, match=r"config\.json of memory:org/mine at revision .* is damaged"):
        store.ensure(SPEC)


def test_second_hub_resolves_revisions(memory_hub: MemoryHub) -> None:
    """For entries that pin none, and for the question which pins are outdated."""
    assert revisions.resolve_revisions(LOOSE, revisions.RevisionResolver()).revision == COMMIT
    behind = SPEC.model_copy(update={"revision": "f" * 40})
    (pin,) = outdated.compare(Registry({"mine": behind}))
    assert (pin.newest, pin.is_outdated) == (COMMIT, True)


def test_second_hub_is_prefetched_from(memory_hub: MemoryHub) -> None:
    """And its revisions are pruned."""
    size = sum(map(len, FILES.values()))
    assert list(prefetch(PrefetchRequest(specs=(LOOSE,))))[-1] == ModelReady(
        "loose", HUB_ID, COMMIT, size, fetched=True
    )
    assert store.prune([LOOSE]) == []
    assert [(hub_id, revision) for hub_id, revision, _ in store.prune([])] == [(HUB_ID, COMMIT)]
    assert store.find(SPEC) is None


def test_unknown_hub_is_refused_with_the_nearest(memory_hub: MemoryHub) -> None:
    """A mistyped name before the colon."""
    with pytest.raises(UsageError, match=r"names the hub 'memry', which is unknown\. Did you mean 'memory'"):
        hub.hub_for("memry:org/mine")
