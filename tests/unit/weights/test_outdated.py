"""`models --outdated`: the real hub client asks a fake hub for the commits of all repositories at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.cli import outdated
from service.errors import WeightsError
from service.registry.models import ModelSpec, Registry
from service.weights.outdated import Pin, compare
from tests.fakes.hub import Hub, Repository
from tests.unit.hub_client import COMMIT

NEW = "f" * 40


def registry(*specs: ModelSpec) -> Registry:
    """Return a registry of these."""
    return Registry({spec.key: spec for spec in specs})


def test_compare_finds_outdated_pins(cache: Path, hub: Hub) -> None:
    """Of models, drafts and adapters; for what the hub refuses it gives the reason."""
    hub.repositories |= {"org/new": Repository(NEW, {}), "org/shut": Repository(NEW, {}, gated="all")}
    behind = ModelSpec.model_validate(
        {
            "key": "behind",
            "hub_id": "org/new",
            "revision": COMMIT,
            "speculative": {"method": "eagle3", "num_speculative_tokens": 2, "hub_id": "org/mine", "revision": COMMIT},
            "adapters": ({"name": "bot", "hub_id": "org/new"},),
        }
    )
    shut = ModelSpec(key="shut", hub_id="org/shut", revision=COMMIT)
    pins = compare(registry(behind, shut, Registry.load().specs["tiny"]))

    assert pins[:3] == [
        Pin("behind", "org/new", COMMIT, NEW),
        Pin("behind", "org/mine", COMMIT, COMMIT),
        Pin("behind", "org/new", None, NEW),
    ]
    assert [pin.is_outdated for pin in pins] == [True, False, False, False]
    assert (pins[3].hub_id, pins[3].newest) == ("org/shut", None)
    assert "org/shut is gated" in str(pins[3].refusal)
    found = [path for path in hub.requests if "/org/new/" in path or path.endswith("/org/new")]
    assert len(found) == 1, "each repository is requested once"


def test_compare_of_many_repositories_asks_for_several_at_once(cache: Path, hub: Hub) -> None:
    """And returns all of them."""
    names = [f"org/m{i}" for i in range(40)]
    hub.repositories |= {name: Repository(NEW, {}) for name in names}
    specs = [ModelSpec(key=name[4:], hub_id=name, revision=COMMIT) for name in names]

    assert all(pin.is_outdated for pin in compare(registry(*specs)))


def test_compare_without_a_hub_fails(cache: Path) -> None:
    """Only the hub knows the newest commits."""
    with pytest.raises(WeightsError, match=r"is not in reach, and only it knows.*HF_ENDPOINT") as caught:
        compare(registry(ModelSpec(key="m", hub_id="org/mine", revision=COMMIT)))

    assert "\n" not in str(caught.value)


PINS = [Pin("a", "org/a", COMMIT, NEW), Pin("b", "org/b", COMMIT, COMMIT), Pin("c", "org/c", None, NEW)]
REFUSED = Pin("d", "org/d", COMMIT, None, "org/d is gated.")


def test_outdated_pins_are_shown_with_the_way_to_update_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Pins that are up to date are not listed."""
    outdated.show([*PINS, REFUSED], as_json=False)
    lines = capsys.readouterr().out.splitlines()

    assert lines[1].split() == ["a", "org/a", COMMIT[:12], NEW[:12]]
    assert lines[2:4] == ["c: org/c has no revision in its entry, and none is recorded yet", "d: org/d is gated."]
    assert lines[4] == "1 of 3 repositories have a newer commit on the hub."
    assert "--update" in lines[5]


def test_outdated_as_json_has_all(capsys: pytest.CaptureFixture[str]) -> None:
    """For programs: also those that are up to date."""
    outdated.show([*PINS, REFUSED], as_json=True)
    rows = json.loads(capsys.readouterr().out)

    assert [row["outdated"] for row in rows] == [True, False, False, False]
    assert rows[0] == {
        "model": "a", "hub_id": "org/a", "revision": COMMIT, "newest": NEW, "refusal": None, "outdated": True
    }  # fmt: skip
