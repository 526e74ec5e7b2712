"""What a deploy records of models that name no commit, what it carries, and what is left to the first replica."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import modal
import pytest

from service import image
from service.errors import RegistryError, WeightsError
from service.modal_app.deployment import Deployment
from service.registry.models import ModelSpec
from service.settings import Settings
from service.weights import huggingface, revisions

A, B = "a" * 40, "b" * 40
MODELS = '[models.mine]\nhub_id = "org/mine"\n[models.fixed]\nhub_id = "org/fixed"\nrevision = "' + B + '"\n'


class Lock:
    """Whose lock it is does not matter here."""

    @contextmanager
    def held(self, _hub_id: str, _say: Any) -> Iterator[None]:
        """Have it at once."""
        yield


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models file with an entry that names no commit; the cache is empty."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    file = tmp_path / "models.toml"
    file.write_text(MODELS)
    return file


def hub_with(monkeypatch: pytest.MonkeyPatch, commits: dict[str, str] | None) -> list[str]:
    """Put a hub in reach that knows these repositories, or none in reach; return what it is asked."""
    asked: list[str] = []

    def resolve(hub_id: str, token: str | None = None) -> str:
        asked.append(hub_id)
        if commits is None or hub_id not in commits:
            raise WeightsError(f"no {hub_id}")
        return commits[hub_id]

    monkeypatch.setattr(huggingface, "in_reach", lambda: commits is not None)
    monkeypatch.setattr(huggingface, "resolve", resolve)
    return asked


def deployment(models: Path, model: str = "mine") -> Deployment:
    """Resolve a deployment with the file."""
    return Deployment.resolve({"SERVICE_MODELS_FILE": str(models), "SERVICE_MODEL": model})


def test_deploy_records_the_commits_of_the_users_models(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: the deploy after it asks nobody, whatever the hub has by then."""
    asked = hub_with(monkeypatch, {"org/mine": A})
    said: list[str] = []
    settled = deployment(models).settled(None, said.append)
    lock = models.with_name("models.lock.toml")

    assert (settled.spec.revision, settled.registry.specs["mine"].revision) == (A, A)
    assert said == [f"org/mine is at {A}, recorded in {lock}"]
    assert asked == ["org/mine"]
    assert deployment(models).settled(None, pytest.fail).spec.revision == A
    assert asked == ["org/mine"]


def test_deploy_of_pinned_models_asks_nobody_and_writes_nothing(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the built-in registry that name none are settled when somebody wants them."""
    asked = hub_with(monkeypatch, {})
    models.write_text(MODELS.replace('"org/mine"', f'"org/mine"\nrevision = "{A}"'))
    before = deployment(models)

    assert before.settled(None, pytest.fail) is before
    assert asked == []
    assert sorted(path.name for path in models.parent.iterdir() if "models" in path.name) == ["models.toml"]


def test_deploy_with_no_hub_in_reach_leaves_it_to_the_first_replica(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No word, no file; that replica records it on the volume, and a second one takes it from there."""
    hub_with(monkeypatch, None)
    deployed = deployment(models).settled(None, pytest.fail)
    assert deployed.spec.revision is None
    assert not models.with_name("models.lock.toml").exists()

    hub_with(monkeypatch, {"org/mine": A})
    said: list[str] = []
    assert deployed.served("mine", None, Lock(), said.append).revision == A
    assert said == [f"org/mine is at {A}, recorded in {revisions.cache_record()}"]
    hub_with(monkeypatch, {"org/mine": B})
    assert deployed.served("mine", None, Lock(), said.append).revision == A


def test_replica_without_hub_and_record_says_what_is_missing(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not serve whatever it happens to find."""
    hub_with(monkeypatch, None)
    with pytest.raises(WeightsError, match=r"org/mine is at no known commit.*write the revision into the entry"):
        deployment(models).served("mine", None, Lock(), print)


def test_deploy_of_a_file_that_takes_no_lock_file_leaves_it_to_the_first_replica(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be carried does not count: replicas would not know of it."""
    hub_with(monkeypatch, {"org/mine": A})
    monkeypatch.setattr(revisions, "lock_file", lambda _: Path("/proc/nowhere/models.lock.toml"))

    assert deployment(models).settled(None, pytest.fail).spec.revision is None


def test_deploy_goes_on_without_a_commit_that_the_hub_refuses(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A private model that the deployer may not see does not keep the others from being recorded."""
    models.write_text(MODELS + '[models.private]\nhub_id = "org/private"\n')
    hub_with(monkeypatch, {"org/mine": A})
    settled = deployment(models).settled(None, lambda _: None)

    assert settled.registry.specs["private"].revision is None
    assert settled.registry.specs["mine"].revision == A


def test_image_carries_the_lock_file(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the models file, by the name that the registry looks for there."""
    added: dict[str, str] = {}

    def add(self: modal.Image, local: str | Path, remote: str) -> modal.Image:
        added[remote] = str(local)
        return self

    monkeypatch.setattr(modal.Image, "add_local_file", add)
    lock = models.with_name("models.lock.toml")
    settings = Settings(models_file=str(models))
    image.image(settings, deployment(models).spec)
    assert list(added) == ["/root/service-models.toml"]

    revisions.record(lock, {"org/mine": A})
    image.image(settings, deployment(models).spec)
    assert added == {"/root/service-models.toml": str(models), "/root/service-models.lock.toml": str(lock)}
    assert revisions.lock_file("/root/service-models.toml") == Path("/root/service-models.lock.toml")


def test_image_of_an_adapter_of_this_machine_is_refused() -> None:
    """No container has it."""
    spec = ModelSpec.model_validate(
        {"key": "mine", "hub_id": "org/mine", "adapters": ({"name": "one", "path": "/adapters/one"},)}
    )
    with pytest.raises(RegistryError, match=r"Adapter 'one' of model 'mine' is the directory /adapters/one.*hub_id"):
        image.image(Settings(), spec)
