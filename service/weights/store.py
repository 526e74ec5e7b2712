"""The weights of registry entries: fetched from the hub into the cache once, verified, and used offline from then on.

The cache is huggingface_hub's own (`HF_HOME`, by default `~/.cache/huggingface`): on Modal a volume, on a laptop shared
with every other program that uses the hub. A complete revision there is used without a request to the hub.
Every revision is a commit, and is fetched under a lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from service.errors import WeightsError
from service.registry.models import ModelSpec
from service.weights import adapters as adapter_files
from service.weights import checksums, download_process, hub_cache, manifest, pruning
from service.weights.files import (
    RepositorySpec,
    adapter_repository,
    check_safetensors,
    draft_repository,
    label,
    model_repository,
    repositories,
    select_files,
)
from service.weights.hub import hub_for
from service.weights.locks import LocalLock, Lock
from service.weights.manifest import Manifest
from service.weights.progress import Progress


@dataclass(frozen=True)
class Weights:
    """The directories that the engine reads: the model's, and those of its draft model and adapters, where it has any.

    Attributes:
        model: The model's directory.
        draft: The draft model's directory.
        adapters: The adapters' directories, by name.
        fetched: This call downloaded or verified something, so a shared cache (a Modal volume) has changes to commit.
    """

    model: Path
    draft: Path | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)
    fetched: bool = False


def find(spec: ModelSpec) -> Weights | None:
    """Return the weights of `spec` when all of them are in the cache; makes no connection."""
    return _gather(spec, _find_complete)


def ensure(spec: ModelSpec, lock: Lock | None = None) -> Weights:
    """Return the weights of `spec`, fetching what is missing; finished files of an earlier attempt are kept.

    Args:
        spec: The registry entry.
        lock: Serialises fetches of the same repository; None: a lock among the processes of this machine.

    Raises:
        GatedModelError: The hub wants a token of an account that accepted the model's licence.
        DiskSpaceError: The cache has too little room for what is missing, or became full.
        WeightsError: The hub cannot be reached, or has no such repository or revision, or sends damaged files.
    """
    return _Fetch(_find_complete, lambda _: None, lock).run(spec)


def fetch(
    spec: ModelSpec, on_progress: Callable[[Progress], None] = lambda _: None, lock: Lock | None = None
) -> Weights:
    """Do as `ensure` does, and also verify what another program downloaded into the cache.

    Args:
        spec: The registry entry.
        on_progress: Called a few times a second, for one repository after the other.
        lock: As in `ensure`.

    Raises:
        WeightsError: As in `ensure`.
    """
    return _Fetch(_find_verified, on_progress, lock).run(spec)


def ensure_adapters(spec: ModelSpec) -> dict[str, Path]:
    """Return the directories of an entry's adapters, fetching what is missing; each is checked.

    Raises:
        WeightsError: As in `ensure`, or one of them is none that the model's engine could serve.
    """
    return _gather_adapters(spec, _Fetch(_find_complete, lambda _: None, None).ensure_one, _base(spec))


def find_adapters(spec: ModelSpec) -> dict[str, Path]:
    """Return the directories of those adapters of an entry that are here; each is checked. Makes no connection.

    Raises:
        WeightsError: One of them is none that the model's engine could serve.
    """
    return _gather_adapters(spec, _find_complete, _base(spec))


def _base(spec: ModelSpec) -> Path | None:
    """Return the directory of an entry's model; None: it is not here."""
    repository = model_repository(spec)
    return _find_complete(repository) if repository else spec.directory


def size_gb(spec: ModelSpec) -> float:
    """Return the size (10^9 bytes) of the model that the engine reads: of its files here, else as the hub lists them.

    Raises:
        WeightsError: They are not here, and the hub cannot be reached, or has no such repository or revision.
    """
    repository = model_repository(spec)
    directory = _find_complete(repository) if repository else _local_directory(spec.directory, spec.key)
    if directory:
        sizes = {file.name: file.stat().st_size for file in directory.iterdir() if file.is_file()}
    else:
        assert repository is not None  # noqa: S101 - a registry entry has a path or a repository
        listed = hub_for(repository.hub_id).list_files(repository).files
        sizes = {path: file.size for path, file in listed.items() if "/" not in path}
    return sum(sizes[path] for path in select_files(sizes, repository or RepositorySpec(spec.key))) / 1e9


def verify(spec: ModelSpec, workers: int = 2, on_progress: Callable[[Progress], None] = lambda _: None) -> list[str]:
    """Read every file and return a sentence about each that differs from the hub's; a revision with one is not served.

    Args:
        spec: The registry entry.
        workers: How many files are read at once.
        on_progress: Called after each piece that was read, from the reading threads.

    Raises:
        WeightsError: This service has not fetched them, and the hub, which knows the checksums, does not answer.
    """
    return [sentence for repository in repositories(spec) for sentence in _verify(repository, workers, on_progress)]


def prune(keep: Iterable[ModelSpec]) -> list[tuple[str, str, int]]:
    """Remove the revisions that this service fetched and `keep` does not name; return hub id, revision and bytes."""
    return pruning.prune([repository for spec in keep for repository in repositories(spec)])


class _Fetch:
    """Fetches one repository after the other, each under its lock."""

    def __init__(
        self,
        find: Callable[[RepositorySpec], Path | None],
        on_progress: Callable[[Progress], None],
        lock: Lock | None,
    ) -> None:
        self._find, self._on_progress, self._lock = find, on_progress, lock or LocalLock()
        self._fetched = False

    def run(self, spec: ModelSpec) -> Weights:
        found = _gather(spec, self.ensure_one)
        assert found is not None  # noqa: S101 - ensure_one raises where it finds nothing
        return Weights(found.model, found.draft, found.adapters, self._fetched)

    def ensure_one(self, repository: RepositorySpec) -> Path:
        """Return the directory of a repository, which is fetched where it is missing."""
        if path := self._find(repository):
            return path
        with self._lock.held(repository.hub_id):
            if path := self._find(repository):  # fetched by the process that held the lock
                return path
            path = download_process.download_in_child(repository, self._on_progress)
            self._fetched = True
            return path


def _gather(spec: ModelSpec, get: Callable[[RepositorySpec], Path | None]) -> Weights | None:
    """Return the directories of all repositories of an entry; None when one of them is missing."""
    model, draft = model_repository(spec), draft_repository(spec)
    directory = get(model) if model else _local_directory(spec.directory, spec.key)
    draft_directory = get(draft) if draft else None
    adapters = _gather_adapters(spec, get, directory)
    is_whole = len(adapters) == len(spec.adapters)
    if directory is None or not is_whole or (draft and draft_directory is None):
        return None
    for part in (directory, draft_directory):
        if part and part.is_dir():
            check_safetensors(_paths(part), f"'{part}' of model '{spec.key}'")
    return Weights(directory, draft_directory, adapters)


def _gather_adapters(
    spec: ModelSpec, get: Callable[[RepositorySpec], Path | None], base: Path | None
) -> dict[str, Path]:
    """Return the directory of each adapter of an entry that is here.

    Raises:
        WeightsError: The engine of the entry's model could not serve one of them.
    """
    found: dict[str, Path] = {}
    for adapter in spec.adapters:
        repository = adapter_repository(adapter)
        if path := get(repository) if repository else adapter.directory:
            if path.is_dir():
                check_safetensors(_paths(path), f"'{path}' of model '{spec.key}'")
            adapter_files.check_directory(path, adapter.name, spec, base)
            found[adapter.name] = path
    return found


def _paths(directory: Path) -> list[str]:
    """Return the files from which weights may be read: those of the directory, and those of its parts."""
    found = (file for pattern in ("*", "*/*.bin", "*/*.safetensors") for file in directory.glob(pattern))
    return [str(file.relative_to(directory)) for file in found]


def _local_directory(directory: Path | None, key: str) -> Path:
    assert directory is not None  # noqa: S101 - a registry entry has a path or a repository
    if not (directory / "config.json").is_file():
        raise WeightsError(
            f"'{directory}' of model '{key}' has no config.json.", hint="Give the directory of a model, or a hub_id."
        )
    return directory


def _find_verified(repository: RepositorySpec) -> Path | None:
    """Return the directory of a revision that this service has verified."""
    revision = repository.revision or hub_cache.newest_known(repository.hub_id)
    found = manifest.read(repository.hub_id, revision) if revision else None
    if found is None or not found.is_complete_for(repository):
        return None
    return hub_cache.snapshot(repository.hub_id, found.revision)


def _find_complete(repository: RepositorySpec) -> Path | None:
    """Return the directory of a complete revision, whichever program downloaded it."""
    if path := _find_verified(repository):
        return path
    revision = repository.revision or hub_cache.newest_known(repository.hub_id)
    if revision is None or manifest.is_managed(repository.hub_id, revision):
        return None
    directory = hub_cache.snapshot(repository.hub_id, revision)
    return directory if hub_cache.looks_complete(directory, repository) else None


def _verify(repository: RepositorySpec, workers: int, on_progress: Callable[[Progress], None]) -> list[str]:
    hub_id = repository.hub_id
    revision = repository.revision or hub_cache.newest_known(hub_id)
    if revision is None or not hub_cache.snapshot(hub_id, revision).is_dir():
        return [f"{repository.label} is not in the cache."]
    with LocalLock().held(hub_id):
        known = manifest.read_all_verified(hub_id, revision)
        known = known or hub_for(hub_id).list_files(RepositorySpec(hub_id, revision))
        files = known.select(repository)
        counter = checksums.ByteCounter(hub_id, [file.size for file in files.values()], on_progress)
        mismatches = checksums.mismatches(hub_cache.snapshot(hub_id, revision), files, workers, counter.add)
        if mismatches:
            manifest.invalidate(known, mismatches)
        else:
            manifest.write(Manifest(known.hub_id, revision, known.files, known.verified | files.keys()))
    return [f"{path} of {label(hub_id)} {reason}." for path, reason in mismatches.items()]
