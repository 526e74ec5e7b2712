"""Weights from a fake hub: fetched whole, or refused with message and hint."""

from __future__ import annotations

import logging
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from service.errors import DiskSpaceError, GatedModelError, WeightsError
from service.registry.models import ModelSpec
from service.weights import download, download_process, store
from tests.fakes.hub import Hub
from tests.unit.hub_client import COMMIT, FILES, SHARDS, SPEC, filled

pytestmark = pytest.mark.usefixtures("cache", "slept", "fetched_here")


@pytest.fixture
def fetched_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetch in this process, whose client and clock the fixtures have; `test_download_process.py` has the child."""
    monkeypatch.setattr(download_process, "download_in_child", download.download)


def test_weights_missing_are_fetched_whole(hub: Hub, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every file, into the cache, logged with size and revision; afterwards the hub is not asked again."""
    caplog.set_level(logging.INFO, "service")
    found = store.ensure(SPEC)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("service.")]

    assert found.fetched
    assert {file.name: file.read_bytes() for file in found.model.iterdir()} == FILES
    assert found.model == cache / "models--org--mine" / "snapshots" / COMMIT
    assert len(said) == 1
    assert "org/mine" in said[0]
    assert COMMIT in said[0]
    asked = len(hub.requests)
    assert store.ensure(SPEC) == store.Weights(found.model)
    assert len(hub.requests) == asked
    assert [record.getMessage() for record in caplog.records if record.name.startswith("service.")] == said


def test_weights_cut_short_are_completed(hub: Hub, cache: Path) -> None:
    """Finished files are kept, the missing shard is fetched."""
    filled(cache, {name: content for name, content in FILES.items() if name != SHARDS[1]})
    found = store.ensure(SPEC)

    assert (found.model / SHARDS[1]).read_bytes() == b"numbers"
    assert not [line for line in hub.requests if line.startswith("GET") and line.endswith(SHARDS[0])]


def test_weights_in_other_formats_are_not_fetched(hub: Hub) -> None:
    """The same weights as a pickle, and the files that the entry ignores."""
    hub.repositories["org/mine"].files |= {"pytorch_model.bin": b"x", "original/a.pth": b"x", "metal/m.bin": b"x"}
    found = store.ensure(SPEC.model_copy(update={"ignore_patterns": ("original/*", "metal/*")}))

    assert {file.name for file in found.model.iterdir()} == set(FILES)


def test_weights_without_a_pinned_revision_are_the_newest(hub: Hub) -> None:
    """A hub id that is in no registry has no pin."""
    assert store.ensure(SPEC.model_copy(update={"revision": None})).model.name == COMMIT


def test_weights_are_not_fetched_where_they_do_not_fit(hub: Hub, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Before the first byte the error names model, size, disk and what to do."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))

    with pytest.raises(DiskSpaceError, match=r"org/mine needs 0\.0 GB and .* has 0\.0 GB free.*HF_HOME"):
        store.ensure(SPEC)
    assert not [line for line in hub.requests if line.startswith("GET") and "/resolve/" in line]


def test_disk_space_is_checked_where_the_weights_go(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`HF_HUB_CACHE` moves the cache away from `HF_HOME`."""
    asked: list[Path] = []
    elsewhere = tmp_path / "large" / "disk"
    elsewhere.mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(elsewhere))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(elsewhere))
    monkeypatch.setattr(download, "check_disk_space", lambda directory, *_: asked.append(directory))
    store.ensure(SPEC)

    assert asked == [elsewhere]


@pytest.mark.parametrize("gated", ["files", "all"])
def test_weights_of_a_gated_model_without_a_token_name_page_and_token(hub: Hub, gated: Any) -> None:
    """The hint: accept the licence there, then set the token, on this machine or on Modal."""
    hub.repositories["org/mine"].gated = gated
    with pytest.raises(GatedModelError) as caught:
        store.ensure(SPEC)

    for part in ("org/mine is gated", f"{hub.url}/org/mine", "HF_TOKEN", "modal secret create huggingface"):
        assert part in str(caught.value)


@pytest.mark.parametrize("gated", ["files", "all"])
def test_weights_of_a_gated_model_with_a_token_that_has_no_access_never_show_it(
    hub: Hub, gated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its account has not accepted the licence."""
    monkeypatch.setenv("HF_TOKEN", "hf_unlicensed")
    hub.repositories["org/mine"].gated = gated
    with pytest.raises(GatedModelError, match="Accept its licence") as caught:
        store.ensure(SPEC)

    assert "hf_unlicensed" not in str(caught.value)


def test_weights_of_a_gated_model_with_its_token_are_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token goes to the hub and nowhere else."""
    hub.repositories["org/mine"].gated = "all"
    monkeypatch.setenv("HF_TOKEN", hub.token)
    found = store.ensure(SPEC)

    assert (found.model / "config.json").is_file()


@pytest.mark.parametrize("token", ["", "hf_right"])
def test_weights_of_an_unknown_repository_name_it(hub: Hub, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing or private: the hub does not distinguish them."""
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(WeightsError, match=f"no repository 'org/gone'.*{hub.url}/org/gone"):
        store.ensure(SPEC.model_copy(update={"hub_id": "org/gone"}))


def test_weights_of_an_unknown_revision_name_it(hub: Hub) -> None:
    """The pin may be mistyped."""
    with pytest.raises(WeightsError, match=f"org/mine has no revision '{'f' * 40}'"):
        store.ensure(SPEC.model_copy(update={"revision": "f" * 40}))


def test_weights_from_a_broken_hub_name_it(hub: Hub) -> None:
    """The error has the hub's address, its answer, and the model that needs no hub."""
    hub.fails_with = 500
    with pytest.raises(WeightsError) as caught:
        store.ensure(SPEC)

    assert hub.url in str(caught.value)
    assert "500" in str(caught.value)
    assert "'tiny'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_without_a_hub_are_refused_soon(slept: list[float]) -> None:
    """No server listens there, so it is not retried for half a minute."""
    with pytest.raises(WeightsError, match=r"cannot be fetched from http://127\.0\.0\.1.*HF_ENDPOINT"):
        store.ensure(SPEC)
    assert sum(slept) < 5


def test_weights_of_a_name_that_the_client_refuses_are_refused() -> None:
    """The hub's client has its own rules for names; its error becomes one of the service."""
    with pytest.raises(WeightsError, match="a/b--c"):
        store.ensure(ModelSpec(key="mine", hub_id="a/b--c"))
