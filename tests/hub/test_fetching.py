"""Weights are fetched once, whole, and only what the engine reads; later they are found without the hub."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from service.errors import WeightsError
from service.registry.models import Adapter, ModelSpec, Speculative
from service.weights import download, download_process, manifest, store
from service.weights import hub as hub_module
from service.weights.progress import Progress
from tests.fakes.hub import Hub, Repository
from tests.fakes.lora import lay_adapter

from .conftest import COMMIT, READ, SHARDS, SPEC, contents
from .processes import python

SOON_S = 10


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetch in this process: a child would import the client for a second."""
    monkeypatch.setattr(download_process, "download_in_child", download.download)


def test_fetch_into_an_empty_cache_brings_what_the_engine_reads(hub: Hub, cache: Path) -> None:
    """Every byte is right; no pickles, no second trees, no code; the manifest has the hub's checksums."""
    reports: list[Progress] = []
    found = store.fetch(SPEC, on_progress=reports.append)

    assert found == store.Weights(cache / "models--org--mine" / "snapshots" / COMMIT, fetched=True)
    assert contents(found.model) == READ
    assert reports[-1].files_done == reports[-1].files == len(READ)
    assert reports[-1].done_bytes == reports[-1].total_bytes == sum(map(len, READ.values()))
    written = manifest.read("org/mine", COMMIT)
    assert written is not None
    assert written.verified == READ.keys()
    assert not manifest.is_partial("org/mine", COMMIT)
    assert not list(cache.rglob("*.incomplete"))


def test_ensure_with_complete_weights_makes_no_connection(
    hub: Hub, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an outage of the hub nor a slow hub can stop a boot."""
    first = store.ensure(SPEC)
    before = len(hub.requests)

    def connect(_: socket.socket, address: Any) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    began = time.monotonic()
    again = store.ensure(SPEC)
    took = time.monotonic() - began

    assert again == store.fetch(SPEC) == store.find(SPEC) == store.Weights(first.model)
    assert took < 5
    assert len(hub.requests) == before


def test_fetch_reads_lists_page_by_page(hub: Hub, here: None) -> None:
    """A repository of a thousand shards has more than one page."""
    hub.page = 3

    assert contents(store.fetch(SPEC).model) == READ


def test_fetch_of_a_model_that_runs_its_own_code_brings_the_code(hub: Hub, here: None) -> None:
    """Only for the entry that runs it; the other entry is complete without."""
    trusting = SPEC.model_copy(update={"extra_args": ("--trust-remote-code",)})
    store.fetch(SPEC)
    assert store.find(trusting) is None
    assert (store.ensure(trusting).model / "modeling_mine.py").is_file()
    assert store.find(SPEC)
    assert len(hub.downloads(next(iter(SHARDS)))) == 1


@pytest.mark.parametrize("config", ["config.json", "adapter_config.json"])
def test_fetch_of_a_repository_of_pickles_alone_is_refused(hub: Hub, here: None, config: str) -> None:
    """Nothing of it is fetched, be it a model, a draft or an adapter."""
    pickle = "adapter_model.bin" if config.startswith("adapter") else "pytorch_model.bin"
    hub.repositories["org/old"] = Repository(COMMIT, {config: b"{}", pickle: b"1"})
    draft = Speculative(method="draft_model", num_speculative_tokens=3, hub_id="org/old", revision=COMMIT)
    adapter = Adapter(name="old", hub_id="org/old", revision=COMMIT)
    for spec in (
        ModelSpec(key="old", hub_id="org/old", revision=COMMIT),
        SPEC.model_copy(update={"speculative": draft}),
        SPEC.model_copy(update={"adapters": (adapter,)}),
    ):
        with pytest.raises(WeightsError, match=f"org/old at revision {COMMIT} has weights that are not in the safe"):
            store.fetch(spec)
    assert not [line for line in hub.requests if "/org/old/resolve/" in line]


def test_pickles_in_the_cache_of_another_program_and_in_a_directory_are_refused(
    hub: Hub, here: None, cache: Path, tmp_path: Path
) -> None:
    """The engine would read them where there are no safetensors."""
    from huggingface_hub import snapshot_download

    hub.repositories["org/lora"] = Repository(COMMIT, {"adapter_config.json": b"{}", "adapter_model.bin": b"1"})
    snapshot_download("org/lora", revision=COMMIT, endpoint=hub.url, cache_dir=cache)
    for name in ("config.json", "pytorch_model.bin"):
        (tmp_path / name).write_text("{}")
    store.fetch(SPEC)

    adapter = Adapter(name="old", hub_id="org/lora", revision=COMMIT)
    assert store.find(SPEC.model_copy(update={"adapters": (adapter,)})) is None
    for spec in (
        ModelSpec(key="own", path=str(tmp_path)),
        SPEC.model_copy(update={"adapters": (Adapter(name="own", path=str(tmp_path)),)}),
    ):
        with pytest.raises(WeightsError, match="not in the safetensors format"):
            store.find(spec)


def test_fetch_of_an_adapter_that_is_none_is_refused(hub: Hub, here: None) -> None:
    """A whole model, say: nothing of it is fetched."""
    adapter = Adapter(name="one", hub_id="org/mine", revision=COMMIT)
    with pytest.raises(WeightsError, match=r"is no LoRA adapter: it has no adapter_config\.json and no adapter_model"):
        store.ensure_adapters(SPEC.model_copy(update={"adapters": (adapter,)}))
    assert not [line for line in hub.requests if "/org/mine/resolve/" in line]


def test_fetch_brings_draft_and_adapters_too(hub: Hub, here: None, tmp_path: Path) -> None:
    """The entry is complete only with all of them."""
    hub.repositories["org/draft"] = Repository(COMMIT, {"config.json": b"{}", "model.safetensors": b"guess"})
    own = lay_adapter(tmp_path / "own")
    lora = {file.name: file.read_bytes() for file in own.iterdir()} | {"optimizer.pt": b"x", "tokenizer.json": b"{}"}
    hub.repositories["org/lora"] = Repository(COMMIT, lora)
    draft = Speculative(method="eagle3", num_speculative_tokens=3, hub_id="org/draft", revision=COMMIT)
    adapters = (
        Adapter(name="sql", hub_id="org/lora", revision=COMMIT),
        Adapter(name="own", path=str(own)),
    )
    spec = SPEC.model_copy(update={"speculative": draft, "adapters": adapters})
    store.fetch(SPEC)
    assert store.find(spec) is None

    found = store.ensure(spec)
    assert found.draft is not None
    assert contents(found.draft) == {"config.json": b"{}", "model.safetensors": b"guess"}
    assert set(contents(found.adapters["sql"])) == {"adapter_config.json", "adapter_model.safetensors"}
    assert found.adapters["own"] == own
    assert store.find(spec) == store.Weights(found.model, found.draft, found.adapters)
    assert store.verify(spec) == []


def test_fetch_without_a_pin_is_by_the_commit_that_was_newest(hub: Hub, here: None) -> None:
    """No request for a file names a branch, so every file is of the listed commit."""
    found = store.fetch(SPEC.model_copy(update={"revision": None}))

    assert found.model.name == COMMIT
    assert not [line for line in hub.requests if "/resolve/main/" in line or "/tree/main" in line]
    assert store.find(SPEC.model_copy(update={"revision": None})) == store.find(SPEC)
    assert hub_module.DEFAULT.resolve("org/mine") == COMMIT


def test_fetch_of_what_another_program_downloaded_verifies_it(hub: Hub, here: None, cache: Path) -> None:
    """`find` accepts it unverified; `fetch` downloads nothing, reads it, and writes a manifest."""
    from huggingface_hub import snapshot_download

    snapshot_download("org/mine", revision=COMMIT, endpoint=hub.url, cache_dir=cache)
    hub.requests.clear()
    assert store.find(SPEC)
    assert manifest.read("org/mine", COMMIT) is None
    assert store.fetch(SPEC).fetched
    assert hub.downloads() == []
    assert manifest.read("org/mine", COMMIT) is not None


def test_fetch_of_a_damaged_file_of_another_program_downloads_it_again(
    hub: Hub, here: None, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The checksum finds a flipped bit in a file of the right size."""
    from huggingface_hub import snapshot_download

    directory = Path(snapshot_download("org/mine", revision=COMMIT, endpoint=hub.url, cache_dir=cache))
    shard = next(iter(SHARDS))
    blob = (directory / shard).resolve()
    blob.write_bytes(SHARDS[shard][:-1] + b"?")
    hub.requests.clear()

    assert contents(store.fetch(SPEC).model).items() >= READ.items()
    assert len(hub.downloads()) == 1
    assert f"{shard} of org/mine is damaged" in caplog.text


def test_fetch_by_an_old_name_logs_the_new_one(hub: Hub, here: None, caplog: pytest.LogCaptureFixture) -> None:
    """The hub redirects; commit and files are the same."""
    hub.renamed["old/name"] = "org/mine"
    found = store.fetch(SPEC.model_copy(update={"hub_id": "old/name"}))

    assert contents(found.model) == READ
    assert "old/name is now called org/mine" in caplog.text


def test_fetch_by_two_processes_at_once_downloads_every_file_once(hub: Hub) -> None:
    """The second one logs that it waits, and then finds the files."""
    program = "show_logs(); print(weights.ensure(spec).fetched)"
    with hub.holding_files():
        first = python(program)
        assert hub.files_requested.wait(SOON_S)
        second = python(program)
        assert second.stdout is not None
        assert "Another process is fetching org/mine" in second.stdout.readline()
    said = [process.communicate(timeout=SOON_S)[0].split()[-1] for process in (first, second)]

    assert said == ["True", "False"]
    assert sorted(hub.downloads()) == sorted(READ)


def test_fetch_that_is_killed_is_continued_by_the_process_that_waits(hub: Hub) -> None:
    """The kernel releases the lock; finished files are kept."""
    program = "show_logs(); print(weights.ensure(spec).fetched)"
    hub.stop_after(400_000)
    first = python(program)
    assert hub.stopped.wait(SOON_S)
    second = python(program)
    assert second.stdout is not None
    assert "waiting until it has finished or ended" in second.stdout.readline()
    first.send_signal(signal.SIGKILL)
    first.communicate()
    hub.resume()

    assert second.communicate(timeout=SOON_S)[0].split()[-1] == "True"
    found = store.find(SPEC)
    assert found is not None
    assert contents(found.model) == READ


def test_prune_removes_only_what_no_entry_names_and_only_what_was_fetched_here(
    hub: Hub, here: None, cache: Path
) -> None:
    """Another program's download stays, and so does content that a kept revision has too."""
    from huggingface_hub import snapshot_download

    newer = "f" * 40
    store.fetch(SPEC)
    old = hub.repositories["org/mine"]
    shard = next(iter(SHARDS))
    hub.repositories["org/mine"] = Repository(newer, {**old.files, shard: b"newer"}, large=old.large)  # type: ignore[arg-type]
    store.fetch(SPEC.model_copy(update={"revision": newer}))
    hub.repositories["org/theirs"] = Repository(COMMIT, {"config.json": b"{}", "model.safetensors": b"1"})
    snapshot_download("org/theirs", revision=COMMIT, endpoint=hub.url, cache_dir=cache)
    keep = SPEC.model_copy(update={"revision": newer})

    removed = [("org/mine", COMMIT, len(SHARDS[shard]))]
    assert store.prune([SPEC, keep]) == []
    assert store.prune([keep]) == removed
    assert store.find(SPEC) is None
    assert store.find(keep)
    assert store.verify(keep) == []
    assert store.prune([]) == [("org/mine", newer, sum(map(len, READ.values())) - len(SHARDS[shard]) + 5)]
    assert [path.name for path in cache.glob("models--*")] == ["models--org--theirs"]
