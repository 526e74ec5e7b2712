"""Downloads killed at any byte: finished files are kept, the rest is not served, the next attempt completes it."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from service.weights import manifest, store
from service.weights.files import RepositorySpec
from tests.fakes.hub import Hub

from .conftest import COMMIT, READ, SPEC, contents
from .processes import Downloads, python

REPOSITORY = RepositorySpec("org/mine", COMMIT)
TOTAL = sum(map(len, READ.values()))
SOON_S = 20


def finished(cache: Path) -> set[str]:
    """Return the files that are in the snapshot already."""
    snapshot = cache / "models--org--mine" / "snapshots" / COMMIT
    return set(contents(snapshot)) if snapshot.is_dir() else set()


@pytest.mark.parametrize("seed", range(50))
def test_fetch_killed_at_a_random_byte_is_completed_by_the_next(
    hub: Hub, cache: Path, downloads: Downloads, seed: int
) -> None:
    """`kill -9` after so many bytes: no half model is found, kept files are not fetched again, all is right."""
    at = random.Random(seed).randrange(TOTAL)  # noqa: S311 - reproducible
    hub.stop_after(at)
    process = downloads.start(REPOSITORY)
    assert hub.stopped.wait(SOON_S)
    process.kill()
    process.join()
    assert store.find(SPEC) is None
    kept = finished(cache)
    hub.resume()
    hub.requests.clear()

    again = downloads.start(REPOSITORY)
    again.join(SOON_S)
    assert again.exitcode == 0
    found = store.find(SPEC)
    assert found is not None
    assert contents(found.model) == READ
    assert not [path for path in kept if hub.downloads(path)]
    assert not list(cache.rglob("*.incomplete"))
    assert not list(cache.rglob("*.tmp"))


@pytest.mark.parametrize("seed", range(6))
def test_fetch_killed_while_it_verifies_is_not_served(hub: Hub, cache: Path, downloads: Downloads, seed: int) -> None:
    """All bytes are in the cache without a manifest: the next attempt reads them, and downloads nothing."""
    hub.stop_after(TOTAL - 1)
    process = downloads.start(REPOSITORY)
    assert hub.stopped.wait(SOON_S)
    hub.resume()
    deadline = time.monotonic() + SOON_S
    while finished(cache) != READ.keys():
        assert time.monotonic() < deadline
    time.sleep(random.Random(seed).random() * 0.06)  # noqa: S311 - amid the verification, or a little after
    process.kill()
    process.join()
    assert (store.find(SPEC) is None) == (manifest.read("org/mine", COMMIT) is None)
    hub.requests.clear()
    again = downloads.start(REPOSITORY)
    again.join(SOON_S)

    assert again.exitcode == 0
    assert hub.downloads() == []
    assert store.find(SPEC) is not None
    assert not manifest.is_partial("org/mine", COMMIT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_fetch_whose_parent_ends_leaves_no_partial_file(hub: Hub, cache: Path, number: signal.Signals) -> None:
    """Ctrl-C and `kill -9` of the parent end the child too, and the next attempt completes the download."""
    hub.stop_after(300_000)
    parent = python("weights.ensure(spec)")
    assert hub.stopped.wait(SOON_S)
    os.kill(parent.pid, number)
    parent.communicate(timeout=SOON_S)
    assert store.find(SPEC) is None
    kept = finished(cache)
    hub.resume()
    hub.requests.clear()

    assert contents(store.ensure(SPEC).model) == READ
    assert not [path for path in kept if hub.downloads(path)]
