"""Weights: from the hub into the cache, once; verified; offline from then on.

The cache is huggingface_hub's own (`HF_HOME`, by default `~/.cache/huggingface`): on Modal a volume, on a laptop shared
with every other program that uses the hub. What is complete there is used without asking the hub. Everything is
addressed by commit, and fetched under a lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from service.errors import WeightsError
from service.registry.models import ModelSpec
from service.weights import checksums, huggingface, manifest, pruning, unmarked
from service.weights import download_process as fetching
from service.weights.files import Wanted, draft_of, model_of, repositories_of
from service.weights.huggingface_errors import explained
from service.weights.locks import FlockLock, Lock
from service.weights.manifest import Marker
from service.weights.progress import Progress

__all__ = ["Lock", "Progress", "Weights", "ensure", "fetch", "find", "prune", "resolve", "verify"]


@dataclass(frozen=True)
class Weights:
    """Directories the engine reads: the model's, and those of its draft model and adapters where the entry has any.

    Attributes:
        model: The model's directory.
        draft: The draft model's.
        adapters: Those of the adapters, by name.
        fetched: They came from the hub just now, so a cache that others share has something new.
    """

    model: Path
    draft: Path | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)
    fetched: bool = False


def find(spec: ModelSpec) -> Weights | None:
    """Return the weights of `spec` when all of them are here; no connection is made."""
    return _gather(spec, _here)


def ensure(
    spec: ModelSpec,
    token: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    lock: Lock | None = None,
) -> Weights:
    """Return the weights of `spec`, fetching what is missing; finished files of an earlier attempt are kept.

    Args:
        spec: The registry entry.
        token: The hub's token, for gated models.
        say: Called with a sentence when a download begins, and when another process is awaited.
        lock: Keeps others from fetching the same; by default other processes of this machine.

    Raises:
        GatedModelError: The hub wants a token of somebody who accepted the model's licence.
        DiskSpaceError: The cache has too little room for what is missing, or got full.
        WeightsError: The hub cannot be reached, or has no such repository or revision, or sends something else.
    """
    return _Bringing(_here, token, say, lambda _: None, lock).all_of(spec)


def fetch(
    spec: ModelSpec,
    token: str | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    lock: Lock | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Weights:
    """Do as `ensure` does, and verify what somebody else brought into the cache.

    Args:
        spec: The registry entry.
        token: The hub's token, for gated models.
        on_progress: Called a few times a second, a repository after the other.
        lock: As in `ensure`.
        say: As in `ensure`.

    Raises:
        WeightsError: As in `ensure`.
    """
    return _Bringing(_marked, token, say, on_progress, lock).all_of(spec)


def verify(spec: ModelSpec, workers: int = 2, on_progress: Callable[[Progress], None] = lambda _: None) -> list[str]:
    """Read every file and return a sentence about each that is not what the hub says; those are not served any more.

    Args:
        spec: The registry entry.
        workers: How many files are read at once.
        on_progress: Called after each piece that was read, from the threads that read.

    Raises:
        WeightsError: This service has not fetched them, and the hub, which knows the checksums, does not answer.
    """
    return [sentence for wanted in repositories_of(spec) for sentence in _verify(wanted, workers, on_progress)]


def prune(keep: Iterable[ModelSpec], dry_run: bool = False) -> list[tuple[str, str, int]]:
    """Remove the revisions that this service fetched and no entry names; return hub id, revision and bytes of each."""
    return pruning.prune([wanted for spec in keep for wanted in repositories_of(spec)], dry_run=dry_run)


def resolve(hub_id: str, token: str | None = None) -> str:
    """Return the commit that the newest revision of a repository is now.

    Raises:
        WeightsError: The hub cannot be reached, or has no such repository.
    """
    return huggingface.resolve(hub_id, token)


class _Bringing:
    """Gets one repository after the other, each under its lock."""

    def __init__(
        self,
        here: Callable[[Wanted], Path | None],
        token: str | None,
        say: Callable[[str], None],
        on_progress: Callable[[Progress], None],
        lock: Lock | None,
    ) -> None:
        self._here, self._token, self._say, self._on_progress = here, token, say, on_progress
        self._lock = lock or FlockLock()
        self._fetched = False

    def all_of(self, spec: ModelSpec) -> Weights:
        found = _gather(spec, self._one)
        assert found is not None  # noqa: S101 - _one raises where it finds nothing
        return Weights(found.model, found.draft, found.adapters, self._fetched)

    def _one(self, wanted: Wanted) -> Path:
        if path := self._here(wanted):
            return path
        with self._lock.held(wanted.hub_id, self._say):
            if path := self._here(wanted):  # by the one that was waited for
                return path
            path = fetching.in_child(wanted, self._token, self._say, self._on_progress)
            self._fetched = True
            return path


def _gather(spec: ModelSpec, get: Callable[[Wanted], Path | None]) -> Weights | None:
    """Return the directories of all that an entry consists of, None when one of them is not to be had."""
    model, draft = model_of(spec), draft_of(spec)
    directory = get(model) if model else _existing(spec.directory, spec.key)
    draft_directory = get(draft) if draft else None
    adapters: dict[str, Path] = {}
    for adapter in spec.adapters:
        path = get(Wanted(adapter.hub_id, adapter.revision)) if adapter.hub_id else adapter.directory
        if path is None:
            return None
        adapters[adapter.name] = path
    if directory is None or (draft and draft_directory is None):
        return None
    return Weights(directory, draft_directory, adapters)


def _existing(directory: Path | None, key: str) -> Path:
    assert directory is not None  # noqa: S101 - a registry entry has a path or a hub id
    if not (directory / "config.json").is_file():
        raise WeightsError(
            f"'{directory}' of model '{key}' has no config.json. Give the directory of a model, or a hub_id."
        )
    return directory


def _marked(wanted: Wanted) -> Path | None:
    """Return the directory of a revision that this service has verified."""
    revision = wanted.revision or manifest.newest_known(wanted.hub_id)
    marker = manifest.read(wanted.hub_id, revision) if revision else None
    return manifest.snapshot(wanted.hub_id, marker.revision) if marker and marker.covers(wanted) else None


def _here(wanted: Wanted) -> Path | None:
    """Return the directory of a complete revision, whoever brought it."""
    if path := _marked(wanted):
        return path
    revision = wanted.revision or manifest.newest_known(wanted.hub_id)
    if revision is None or manifest.is_ours(wanted.hub_id, revision):
        return None
    directory = manifest.snapshot(wanted.hub_id, revision)
    return directory if unmarked.is_complete(directory, wanted) else None


def _verify(wanted: Wanted, workers: int, on_progress: Callable[[Progress], None]) -> list[str]:
    revision = wanted.revision or manifest.newest_known(wanted.hub_id)
    if revision is None or not manifest.snapshot(wanted.hub_id, revision).is_dir():
        return [f"{wanted.at} is not here. Fetch it: vllm-service prefetch."]
    with FlockLock().held(wanted.hub_id, lambda _: None):
        marker = manifest.known(wanted.hub_id, revision) or _listed(Wanted(wanted.hub_id, revision))
        files = marker.chosen(wanted)
        progress = checksums.Meter(wanted.hub_id, files, on_progress)
        faults = checksums.faults(manifest.snapshot(wanted.hub_id, revision), files, workers, progress.add)
        if faults:
            manifest.distrust(marker, faults)
        else:
            manifest.write(Marker(marker.hub_id, revision, marker.files, marker.verified | files.keys()))
    return [f"{path} of {wanted.hub_id} {why}. Fetch it again: vllm-service prefetch." for path, why in faults.items()]


def _listed(wanted: Wanted) -> Marker:
    token = fetching.hub_token(os.environ)
    with explained(wanted, token), huggingface.connected():
        return huggingface.plan(wanted, token)
