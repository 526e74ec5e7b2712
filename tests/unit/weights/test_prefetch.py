"""Prefetch on this machine, with the real hub client, a fake hub and an empty cache."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from service.errors import UnknownModelError, UsageError, WeightsError
from service.registry.models import ModelSpec, Registry
from service.weights import prefetch, store
from service.weights.prefetch import (
    Message,
    ModelFailed,
    ModelReady,
    PrefetchEvent,
    PrefetchRequest,
    RevisionRemoved,
    RevisionResolved,
)
from service.weights.progress import Progress
from service.weights.revisions import cache_record, lock_file, read, record
from tests.fakes.hub import Hub, Repository
from tests.unit.hub_client import COMMIT, FILES

OTHER = "f" * 40
LOOSE = ModelSpec(key="loose", hub_id="org/mine")
SPEC = ModelSpec(key="mine", hub_id="org/mine", revision=COMMIT)
REGISTRY = Registry({"mine": SPEC, "tiny": Registry.load().specs["tiny"]})


def run(**fields: Any) -> list[PrefetchEvent]:
    """Do a request and return its events."""
    return list(prefetch.prefetch(PrefetchRequest(**fields)))


def requested(*names: str, everything: bool = False, on_modal: bool = False, **options: bool) -> PrefetchRequest:
    """Return the request for these names of a registry of two."""
    return prefetch.build_request(list(names), REGISTRY, None, everything=everything, on_modal=on_modal, **options)


def test_request_of_names_has_each_model_once() -> None:
    """Key, hub id and a GPU behind the name are one model."""
    assert [spec.key for spec in requested("mine", "ORG/mine", "mine-h100").specs] == ["mine"]
    assert requested("mine").recorded_in == str(lock_file(None))


def test_request_of_everything_is_the_registry() -> None:
    """With the models that need no download."""
    assert [spec.key for spec in requested(everything=True).specs] == ["mine", "tiny"]


def test_request_of_a_hub_id_of_no_registry_is_for_this_machine_only() -> None:
    """A deployed service cannot serve it; on this machine it has no lock file."""
    request = requested("some/model")

    assert [spec.hub_id for spec in request.specs] == ["some/model"]
    assert request.recorded_in is None
    assert requested("some/mine").recorded_in is None, "an entry has its key, and is another model"
    with pytest.raises(UnknownModelError):
        requested("some/model", on_modal=True)
    with pytest.raises(UnknownModelError, match="Did you mean 'mine'"):
        requested("mime")


@pytest.mark.parametrize(("names", "everything", "said"), [((), False, "--all"), (("mine",), True, "mine")])
def test_request_of_nothing_or_of_too_much_is_refused(names: tuple[str, ...], everything: bool, said: str) -> None:
    """The message lists the registered names."""
    with pytest.raises(UsageError) as caught:
        requested(*names, everything=everything)

    assert said in str(caught.value)
    assert "mine" in str(caught.value)


def test_request_to_prune_needs_no_model_and_keeps_the_registrys() -> None:
    """And the models that are named."""
    assert {spec.key for spec in requested(prune=True).keep} == {"mine", "tiny"}
    assert {spec.hub_id for spec in requested("some/model", prune=True).keep} == {"org/mine", None, "some/model"}
    assert requested("mine").keep == ()


def test_request_with_update_ignores_the_lock_file(tmp_path: Path) -> None:
    """The entry's own revision still counts."""
    models = tmp_path / "models.toml"
    models.write_text(f'[models.loose]\nhub_id = "org/loose"\n[models.pinned]\nhub_id = "a/b"\nrevision = "{COMMIT}"\n')
    record(lock_file(models), {"org/loose": OTHER})
    locked = prefetch.revisions.registry(models)
    names = ["loose", "pinned"]

    plain = prefetch.build_request(names, locked, str(models))
    updated = prefetch.build_request(names, locked, str(models), update=True)
    assert [spec.revision for spec in plain.specs] == [OTHER, COMMIT]
    assert [spec.revision for spec in updated.specs] == [None, COMMIT]


def test_request_survives_json() -> None:
    """With drafts and adapters."""
    spec = ModelSpec.model_validate(
        {
            "key": "m",
            "hub_id": "a/b",
            "aliases": ("x",),
            "limit_mm_per_prompt": {"image": 1},
            "speculative": {"method": "mtp", "num_speculative_tokens": 2},
            "adapters": ({"name": "one", "hub_id": "c/d"},),
        }
    )
    request = PrefetchRequest(specs=(spec, *Registry.load().specs.values()), prune=True, keep=(spec,))

    assert PrefetchRequest.model_validate_json(request.model_dump_json()) == request


def test_prefetch_fetches_and_yields_events(cache: Path, hub: Hub) -> None:
    """Messages, progress, and at the end the result; the second time there is nothing to fetch."""
    events = run(specs=(SPEC,))
    size = sum(map(len, FILES.values()))

    assert [event for event in events if isinstance(event, Message)]
    assert [event for event in events if isinstance(event, Progress)][-1].total_bytes == size
    assert events[-1] == ModelReady("mine", "org/mine", COMMIT, size, fetched=True)
    assert run(specs=(SPEC,)) == [ModelReady("mine", "org/mine", COMMIT, size, fetched=False)]


def test_prefetch_of_an_entry_without_a_revision_resolves_it_first(cache: Path, hub: Hub) -> None:
    """The recorded commit is the one that was fetched."""
    events = run(specs=(LOOSE,))

    assert events[0] == RevisionResolved("org/mine", COMMIT)
    assert isinstance(events[-1], ModelReady)
    assert events[-1].revision == COMMIT
    assert read(cache_record()) == {"org/mine": COMMIT}


def test_prefetch_of_a_directory_has_nothing_to_do(cache: Path) -> None:
    """It makes no request."""
    (event,) = run(specs=(Registry.load().specs["tiny"],))

    assert isinstance(event, ModelReady)
    assert (event.hub_id, event.fetched) == (None, False)


def test_prefetch_of_several_goes_on_after_one_failed(cache: Path, hub: Hub) -> None:
    """A user of --all need not have accepted every licence."""
    gone = ModelSpec(key="gone", hub_id="org/gone", revision=COMMIT)
    events = run(specs=(gone, SPEC))
    (failed,) = [event for event in events if isinstance(event, ModelFailed)]

    assert failed.key == "gone"
    assert "org/gone" in failed.reason
    assert isinstance(events[-1], ModelReady)
    with pytest.raises(WeightsError, match="org/gone"):
        run(specs=(gone,))


def test_prefetch_verifies_the_cache(cache: Path, hub: Hub) -> None:
    """A damaged file is named, and only fetched again by a prefetch without --verify."""
    run(specs=(SPEC,))
    (good,) = [
        event
        for event in prefetch.prefetch(PrefetchRequest(specs=(SPEC,), verify=True))
        if isinstance(event, ModelReady)
    ]
    found = store.find(SPEC)
    assert found is not None
    blob = (found.model / "model.safetensors.index.json").resolve()
    blob.chmod(0o644)
    blob.write_bytes(b"[]")
    (bad,) = [
        event
        for event in prefetch.prefetch(PrefetchRequest(specs=(SPEC,), verify=True))
        if isinstance(event, ModelReady)
    ]

    assert good.damage == ()
    assert len(bad.damage) == 1
    assert "index.json" in bad.damage[0]
    assert [event.fetched for event in run(specs=(SPEC,)) if isinstance(event, ModelReady)] == [True]


def test_prefetch_prunes_what_no_entry_names(cache: Path, hub: Hub) -> None:
    """A revision that only the record names stays."""
    hub.repositories["org/old"] = Repository(OTHER, dict(FILES))
    old = ModelSpec(key="old", hub_id="org/old", revision=OTHER)
    run(specs=(old, LOOSE))
    freed = [
        event
        for event in prefetch.prefetch(PrefetchRequest(prune=True, keep=(LOOSE,)))
        if isinstance(event, RevisionRemoved)
    ]

    assert [(event.hub_id, event.revision) for event in freed] == [("org/old", OTHER)]
    assert freed[0].size >= sum(map(len, FILES.values())) - 10
    assert (store.find(old), store.find(SPEC) is None) == (None, False)


def test_prefetch_whose_iterator_is_closed_ends(cache: Path, hub: Hub) -> None:
    """As after Ctrl-C: no thread, no download and no held lock is left."""
    with hub.holding_files():
        events = prefetch.prefetch(PrefetchRequest(specs=(SPEC,)))
        for event in events:
            if isinstance(event, Message):
                break
        assert hub.files_requested.wait(20)
    events.close()
    deadline = time.monotonic() + 10
    while any(thread.name == "prefetch" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)

    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    assert isinstance(run(specs=(SPEC,))[-1], ModelReady)


def test_progress_is_passed_on_a_few_times_a_second() -> None:
    """For each repository and phase the first, the last, and some between."""
    told: list[object] = []
    emit = prefetch._Emitter(told.append, threading.Event())
    for phase in ("fetching", "verifying"):
        for done in range(1001):
            emit(Progress("org/mine", done, 1000, 0, 1, phase))

    ends = [event.done_bytes for event in told if isinstance(event, Progress)]
    assert 4 <= len(ends) < 40
    assert ends[0] == 0
    assert ends.count(1000) == 2
