"""Models whose entries name no commit: what a deploy carries, and what it leaves to the first replica."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import modal
import pytest

from service import image
from service.errors import RegistryError, WeightsError
from service.modal_app.deployment import Deployment
from service.registry.models import ModelSpec
from service.settings import Settings
from service.weights import revisions
from service.weights.huggingface import HuggingFace
from service.weights.reach import Unreachable

A, B = "a" * 40, "b" * 40
MODELS = '[models.mine]\nhub_id = "org/mine"\n[models.fixed]\nhub_id = "org/fixed"\nrevision = "' + B + '"\n'


class Lock:
    """A lock that is always free."""

    @contextmanager
    def held(self, _name: str) -> Iterator[None]:
        """Acquire it at once."""
        yield


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models file with an entry that names no commit; the cache is empty."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    file = tmp_path / "models.toml"
    file.write_text(MODELS)
    return file


def hub_with(monkeypatch: pytest.MonkeyPatch, commits: dict[str, str] | None) -> list[str]:
    """Make a hub with these repositories reachable, or none; return the repositories it is asked for."""
    asked: list[str] = []

    def resolve(_: HuggingFace, hub_id: str) -> str:
        asked.append(hub_id)
        if commits is None or hub_id not in commits:
            raise WeightsError(f"no {hub_id}")
        return commits[hub_id]

    monkeypatch.setattr(HuggingFace, "why_unreachable", lambda _: None if commits is not None else Unreachable("x"))
    monkeypatch.setattr(HuggingFace, "resolve", resolve)
    return asked


def deployment(models: Path, model: str = "mine") -> Deployment:
    """Resolve a deployment with the file."""
    return Deployment.resolve({"SERVICE_MODELS_FILE": str(models), "SERVICE_MODEL": model})


def test_deploy_leaves_what_names_no_commit_to_the_first_replica(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No connection, no file; that replica records the commit on the volume, and a second one reads it."""
    asked = hub_with(monkeypatch, {"org/mine": A})
    deployed = deployment(models)
    assert deployed.spec.revision is None
    assert asked == []
    assert [path.name for path in models.parent.iterdir()] == ["models.toml"]

    caplog.set_level(logging.INFO)
    assert deployed.spec_for_replica("mine", Lock()).revision == A
    assert caplog.messages == [f"org/mine is at {A}, recorded in {revisions.cache_record()}"]
    hub_with(monkeypatch, {"org/mine": B})
    assert deployed.spec_for_replica("mine", Lock()).revision == A


def test_deploy_with_a_lock_file_serves_its_commit(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the deploy nor a replica asks the hub."""
    hub_with(monkeypatch, None)
    revisions.record(models.with_name("models.lock.toml"), {"org/mine": B})
    deployed = deployment(models)

    assert (deployed.spec.revision, deployed.registry.specs["mine"].revision) == (B, B)
    caplog.set_level(logging.INFO)
    assert deployed.spec_for_replica("mine", Lock()).revision == B
    assert caplog.messages == []


def test_replica_without_hub_and_record_says_what_is_missing(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not serve any revision that the cache happens to have."""
    hub_with(monkeypatch, None)
    with pytest.raises(WeightsError, match=r"org/mine is at no known commit.*write the revision into the entry"):
        deployment(models).spec_for_replica("mine", Lock())


def test_image_carries_the_lock_file(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the models file, by the name that the registry looks for there."""
    added: dict[str, str] = {}

    def add(self: modal.Image, local: str | Path, remote: str) -> modal.Image:
        added[remote] = str(local)
        return self

    monkeypatch.setattr(modal.Image, "add_local_file", add)
    lock = models.with_name("models.lock.toml")
    settings = Settings(models_file=str(models))
    image.engine_image(settings, deployment(models).spec)
    assert list(added) == ["/root/service-models.toml"]

    revisions.record(lock, {"org/mine": A})
    image.engine_image(settings, deployment(models).spec)
    assert added == {"/root/service-models.toml": str(models), "/root/service-models.lock.toml": str(lock)}
    assert revisions.lock_file("/root/service-models.toml") == Path("/root/service-models.lock.toml")


def test_image_of_an_adapter_of_this_machine_is_refused() -> None:
    """No container has it."""
    spec = ModelSpec.model_validate(
        {"key": "mine", "hub_id": "org/mine", "adapters": ({"name": "one", "path": "/adapters/one"},)}
    )
    with pytest.raises(RegistryError, match=r"Adapter 'one' of model 'mine' is the directory /adapters/one.*hub_id"):
        image.engine_image(Settings(), spec)
