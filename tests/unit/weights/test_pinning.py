"""`models --pin`: the real hub client asks a hub on loopback, and the lock file has its answers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from service.cli import pins as cli_pins
from service.errors import ServiceError, WeightsError
from service.weights import revisions
from service.weights.pinning import Pins, pin
from tests.fakes.hub import Hub, Repository
from tests.unit.hub_client import COMMIT

NEW = "f" * 40
DRAFTS = tuple(f"RedHatAI/gpt-oss-{size}-speculator.eagle3" for size in ("20b", "120b"))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Return a models file: an entry without a revision, with an adapter of the same repository, and a pinned one."""
    file = tmp_path / "models.toml"
    file.write_text(
        '[models.loose]\nhub_id = "org/mine"\n[[models.loose.adapters]]\nname = "bot"\nhub_id = "org/bot"\n'
        f'[models.fixed]\nhub_id = "org/fixed"\nrevision = "{NEW}"\n'
    )
    return file


def pinned(models: Path) -> Pins:
    """Pin what the file and the built-in registry leave open."""
    return pin(revisions.registry(models), str(models))


def test_pin_writes_the_commits_of_all_unpinned_repositories(cache: Path, hub: Hub, models: Path) -> None:
    """Models, drafts and adapters, into the lock file of the models file; the second run makes no request."""
    hub.repositories |= {name: Repository(NEW, {}) for name in ("org/bot", *DRAFTS)}
    pins = pinned(models)
    lock = models.with_name("models.lock.toml")

    assert pins == Pins(lock, {"org/mine": COMMIT, "org/bot": NEW} | dict.fromkeys(DRAFTS, NEW))
    assert revisions.read(lock) == pins.pinned
    asked = list(hub.requests)
    assert not [question for question in asked if "org/fixed" in question]
    assert pinned(models) == Pins(lock)
    assert hub.requests == asked


def test_pin_keeps_what_it_got_when_the_hub_refuses_a_repository(cache: Path, hub: Hub, models: Path) -> None:
    """A repository that is gone has its reason told; the others are in the lock file."""
    pins = pinned(models)

    assert pins.pinned == {"org/mine": COMMIT} == revisions.read(pins.file)
    assert set(pins.failed) == {"org/bot", *DRAFTS}
    assert "org/bot" in pins.failed["org/bot"]


def test_pin_without_a_hub_writes_nothing(cache: Path, models: Path) -> None:
    """And says of each repository that its commit is unknown."""
    pins = pinned(models)

    assert (pins.pinned, set(pins.failed)) == ({}, {"org/mine", "org/bot", *DRAFTS})
    assert not pins.file.exists()


def test_pin_into_a_directory_that_cannot_be_written_says_what_to_do(
    cache: Path, hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the built-in lock file of an installed package may be."""
    monkeypatch.setattr(revisions, "lock_file", lambda _: Path("/proc/nowhere/models.lock.toml"))
    with pytest.raises(ServiceError, match=r"Lock file '/proc/nowhere/.* cannot be written") as caught:
        pin(revisions.registry(models), str(models))

    assert "SERVICE_MODELS_FILE" in caught.value.hint


def test_pinned_repositories_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """One line each, or a JSON object."""
    pins = Pins(Path("/a/models.lock.toml"), {"org/mine": COMMIT})
    cli_pins.show(pins, as_json=False)
    assert capsys.readouterr().out == f"org/mine is at {COMMIT}, recorded in /a/models.lock.toml{os.linesep}"

    cli_pins.show(pins, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"lock_file": "/a/models.lock.toml", "pinned": {"org/mine": COMMIT}, "failed": {}}


def test_failed_pins_end_the_command_after_the_others_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """With their reasons."""
    pins = Pins(Path("/a/models.lock.toml"), {"org/mine": COMMIT}, {"org/shut": "org/shut is gated."})
    with pytest.raises(WeightsError, match=r"1 of 2 repositories could not be pinned\. org/shut is gated\."):
        cli_pins.show(pins, as_json=False)

    assert "org/mine" in capsys.readouterr().out


def test_nothing_to_pin_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """A command that prints nothing leaves its user in doubt."""
    cli_pins.show(Pins(Path("/a/models.lock.toml")), as_json=False)

    assert "nothing was written" in capsys.readouterr().out
