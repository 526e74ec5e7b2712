"""Uploads in the cache: verified and served as what a hub sent, but nobody sends them again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from service.errors import UsageError, WeightsError
from service.registry.models import ModelSpec, Registry
from service.weights import hub_cache, manifest, pinning, prefetch, revisions, store, uploads
from service.weights.manifest import File, Manifest
from service.weights.model_directory import ModelDirectory
from service.weights.outdated import compare
from tests.fakes.lora import lay_adapter

pytestmark = pytest.mark.usefixtures("cache")
FILES = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"numbers"}
SPEC = ModelSpec(key="mine", volume="bot")


def lay(files: dict[str, bytes], name: str = "bot") -> str:
    """Lay an upload, as it is on the volume; return its revision."""
    hub_id = uploads.repository_of(name)
    listed = {path: File(len(body), f"sha256:{hashlib.sha256(body).hexdigest()}") for path, body in files.items()}
    revision = uploads.revision_of(listed)
    manifest.write(Manifest(hub_id, revision, listed), partial=True)
    directory = hub_cache.snapshot(hub_id, revision)
    directory.mkdir(parents=True)
    for path, body in files.items():
        (directory / path).write_bytes(body)
    hub_cache.newest_ref(hub_id).parent.mkdir(parents=True, exist_ok=True)
    hub_cache.newest_ref(hub_id).write_text(revision)
    return revision


def forbidden(hub_id: str) -> str:
    """Fail: no hub is asked for an upload."""
    raise AssertionError(hub_id)


def adapter_files(directory: Path, rank: int) -> dict[str, bytes]:
    """Return the files of an adapter."""
    return {file.name: file.read_bytes() for file in lay_adapter(directory / "adapter", rank=rank).iterdir()}


def test_upload_is_verified_once_and_then_found(cache: Path, tmp_path: Path) -> None:
    """By its manifest, as what a hub sent; an adapter likewise."""
    revision, adapter = lay(FILES), lay(adapter_files(tmp_path, 4), "loud")
    spec = ModelSpec.model_validate(
        {"key": "mine", "volume": "bot", "revision": revision, "adapters": ({"name": "a", "volume": "loud"},)}
    )
    assert store.find(spec) is None
    found = store.ensure(spec)
    assert found.fetched
    assert found.model == cache / f"uploads--bot/snapshots/{revision}"
    assert found.adapters == {"a": cache / f"uploads--loud/snapshots/{adapter}"}
    assert store.find(spec) == store.Weights(found.model, None, found.adapters)
    assert store.size_gb(spec) == sum(map(len, FILES.values())) / 1e9


@pytest.mark.parametrize("body", [None, b"numbres", b"num"])
def test_upload_with_a_damaged_file_is_refused(body: bytes | None) -> None:
    """Missing, of another content, cut: the error names it and the command that mends it."""
    revision = lay(FILES)
    file = hub_cache.snapshot("volume:bot", revision) / "model.safetensors"
    file.unlink() if body is None else file.write_bytes(body)
    with pytest.raises(WeightsError) as caught:
        store.ensure(SPEC.model_copy(update={"revision": revision}))
    assert str(caught.value) == (
        f"Missing or damaged: 1 of the files of upload 'bot' at revision {revision}: model.safetensors. Upload it "
        "again, which sends only these: vllm-service upload DIR --name bot."
    )


@pytest.mark.parametrize("revision", [None, "f" * 40])
def test_upload_that_is_not_there_says_how_to_make_one(cache: Path, revision: str | None) -> None:
    """The name alone, or a revision that it has not."""
    there = lay(FILES, "bot" if revision else "other")
    with pytest.raises(WeightsError) as caught:
        store.ensure(SPEC.model_copy(update={"revision": revision}))
    at, has = (f" at revision {revision}", f" Its revisions there: {there}.") if revision else ("", "")
    assert caught.value.message == f"There is no upload 'bot'{at} in {cache}.{has}"
    assert caught.value.hint == (
        "Put it on Modal's volume: vllm-service upload DIR --name bot. On this machine serve its directory: "
        "vllm-service up DIR."
    )


def adapter_of(rank: int, directory: Path) -> ModelDirectory:
    """Return what `upload` knows of an adapter."""
    return ModelDirectory(directory, {"adapter_config.json": 1}, (), rank)


@pytest.mark.parametrize(("rank", "limit"), [(9, 16), (16, 16), (65, 128), (400, 512)])
def test_adapter_above_the_rank_of_an_entry_that_names_it_is_refused(tmp_path: Path, rank: int, limit: int) -> None:
    """With both ranks and what to write; the rank that the entry serves is taken, as is any by a name without entry."""
    fields = {"key": "mine", "path": ".", "max_lora_rank": 8, "adapters": ({"name": "a", "volume": "loud"},)}
    spec = ModelSpec.model_validate(fields)
    with pytest.raises(UsageError) as refused:
        uploads.check_entries(adapter_of(rank, tmp_path), "loud", [SPEC, spec])
    assert refused.value.message == f"'{tmp_path}' has rank {rank}, and model 'mine' serves adapters up to rank 8."
    assert refused.value.hint.startswith(f"Write max_lora_rank = {limit} into the entry of 'mine'")
    uploads.check_entries(adapter_of(8, tmp_path), "loud", [spec])
    uploads.check_entries(adapter_of(rank, tmp_path), "quiet", [spec])


def test_entry_of_an_adapter_has_the_limit_that_its_rank_needs(tmp_path: Path) -> None:
    """Where the default is too low."""
    assert uploads.entry(adapter_of(64, tmp_path), "loud", "a" * 40).splitlines()[0] == "[[models.<key>.adapters]]"
    printed = uploads.entry(adapter_of(65, tmp_path), "loud", "a" * 40).splitlines()
    assert printed[:4] == ["[models.<key>]", "max_lora_rank = 128", "", "[[models.<key>.adapters]]"]


def test_weights_with_an_adapter_above_the_rank_of_their_entry_are_refused(tmp_path: Path) -> None:
    """Before an engine boots: on this machine, and by the prefetch of a deploy."""
    revision = lay(FILES)
    lay(adapter_files(tmp_path, 16), "loud")
    fields = {"key": "mine", "volume": "bot", "revision": revision, "adapters": ({"name": "a", "volume": "loud"},)}
    with pytest.raises(WeightsError, match="Adapter 'a' has rank 16, and model 'mine' serves adapters up to rank 8"):
        store.ensure(ModelSpec.model_validate(fields | {"max_lora_rank": 8}))
    assert store.ensure(ModelSpec.model_validate(fields | {"max_lora_rank": 16})).adapters


def test_upload_without_a_revision_is_its_newest() -> None:
    """Told, but not recorded in the cache: another upload would be the newest."""
    told = {}
    for files in (FILES, {**FILES, "config.json": b'{"a": 1}'}):
        revision = lay(files)
        resolver = revisions.RevisionResolver()
        assert revisions.resolve_revisions(SPEC, resolver, told.__setitem__).revision == revision
        assert told == {"volume:bot": revision}
    assert not revisions.cache_record().exists()


def test_lock_file_pins_an_upload(tmp_path: Path) -> None:
    """Model and adapter, by the name that they have there."""
    file = tmp_path / "models.toml"
    file.write_text('[models.mine]\nvolume = "bot"\n[[models.mine.adapters]]\nname = "a"\nvolume = "loud"\n')
    lock = revisions.lock_file(file)
    revisions.record(lock, {"volume:bot": "a" * 40, "volume:loud": "b" * 40})
    spec = revisions.registry(file).specs["mine"]
    assert spec.repositories == (("volume:bot", "a" * 40), ("volume:loud", "b" * 40))


def test_hub_is_not_asked_for_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    """By `models --pin` and `models --outdated`, and `prefetch --all` on this machine leaves them out."""
    registry = Registry({"mine": SPEC})
    monkeypatch.setattr(revisions.RevisionResolver, "__call__", lambda _, hub_id: forbidden(hub_id))
    assert pinning.pin(registry, None).pinned == {}
    assert compare(registry) == []
    assert prefetch.build_request([], registry, None, everything=True).specs == ()
    assert prefetch.build_request([], registry, None, everything=True, on_modal=True).specs == (SPEC,)


def test_prune_keeps_the_newest_revision_of_an_upload() -> None:
    """It cannot be fetched again; an older one that no entry names is removed, with its files."""
    old = lay(FILES)
    new = lay({**FILES, "config.json": b'{"a": 1}'})
    assert store.prune([]) == [("volume:bot", old, sum(map(len, FILES.values())))]
    assert not hub_cache.snapshot("volume:bot", old).exists()
    assert store.ensure(SPEC.model_copy(update={"revision": new})).model.is_dir()


def test_prune_keeps_the_revision_of_an_upload_that_an_entry_names() -> None:
    """Until its entry names another one."""
    old = lay(FILES)
    lay({**FILES, "config.json": b'{"a": 1}'})
    assert store.prune([SPEC.model_copy(update={"revision": old})]) == []


@pytest.mark.parametrize(
    ("directory", "given", "name"),
    [("My Model_v2", None, "my-model-v2"), ("_x", None, "x"), ("a", "qwen3-0.6b-bot", "qwen3-0.6b-bot")],
)
def test_name_of_an_upload_is_given_or_that_of_its_directory(directory: str, given: str | None, name: str) -> None:
    """As an entry can write it."""
    assert uploads.name_for(Path("/models") / directory, given) == name


@pytest.mark.parametrize(("directory", "given"), [("__", None), ("a", "Bot"), ("a", "a/b"), ("a", ""), ("a", "x" * 97)])
def test_name_that_no_entry_could_write_is_refused(directory: str, given: str | None) -> None:
    """The error says which letters it takes."""
    with pytest.raises(UsageError, match="cannot be the name of an upload: it takes 1 to 96 of a to z"):
        uploads.name_for(Path("/models") / directory, given)
