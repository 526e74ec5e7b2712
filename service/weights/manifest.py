"""Manifests: which files of a revision are in the hub cache and have been verified. Makes no connection.

A manifest is written last, when every file that the engine reads has the hub's checksum. It then stands for all of
them: a reader checks only each file's size. Until then a partial manifest keeps what is verified so far, and tells that
the revision must not be served. Both lie in the repository's directory of the cache and are removed with it:
`<cache>/models--<owner>--<name>/vllm-service/<revision>[.partial].json`.

Files are not flushed to the disk one by one: after a loss of power an unwritten file is shorter than its manifest says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from service.files import atomic_write
from service.weights import hub_cache
from service.weights.files import RepositorySpec, select_files

_VERSION = 1
_FOLDER = "vllm-service"


@dataclass(frozen=True)
class File:
    """A file as the hub lists it.

    Attributes:
        size: In bytes.
        checksum: `sha256:<hex>` of a large file's content, `git:<hex>` of a small file as git names it.
    """

    size: int
    checksum: str

    @property
    def blob(self) -> str:
        """The name of its content in the hub cache."""
        return self.checksum.partition(":")[2]


@dataclass(frozen=True)
class Manifest:
    """A revision of a repository: all its files as the hub lists them, and which of them are here and verified."""

    hub_id: str
    revision: str
    files: Mapping[str, File]
    verified: frozenset[str] = frozenset()

    def select(self, repository: RepositorySpec) -> dict[str, File]:
        """Return the files that the engine reads."""
        return {path: self.files[path] for path in select_files(self.files, repository)}

    def is_complete_for(self, repository: RepositorySpec) -> bool:
        """Tell whether all that the engine reads is verified and still has its size."""
        directory = hub_cache.snapshot(self.hub_id, self.revision)
        files = self.select(repository)
        return bool(files) and all(
            path in self.verified and hub_cache.has_size(directory / path, file.size) for path, file in files.items()
        )


def is_managed(hub_id: str, revision: str) -> bool:
    """Tell whether this service fetched the revision or began to: then only a manifest says that it is complete."""
    return is_partial(hub_id, revision) or read(hub_id, revision) is not None


def is_partial(hub_id: str, revision: str) -> bool:
    """Tell whether a fetch of this service began and did not finish, or a file of it was found damaged."""
    return path_of(hub_id, revision, partial=True).exists()


def read(hub_id: str, revision: str, *, partial: bool = False) -> Manifest | None:
    """Return a revision's manifest; None where there is none or it cannot be read."""
    return _load(path_of(hub_id, revision, partial=partial))


def read_all_verified(hub_id: str, revision: str) -> Manifest | None:
    """Return all that is known to be verified, from the complete and the partial manifest together."""
    whole, part = read(hub_id, revision), read(hub_id, revision, partial=True)
    if whole is None or part is None:
        return whole or part
    return Manifest(hub_id, revision, part.files, whole.verified | part.verified)


def write(manifest: Manifest, *, partial: bool = False) -> None:
    """Write a manifest atomically. A complete one replaces the partial one."""
    target = path_of(manifest.hub_id, manifest.revision, partial=partial)
    atomic_write(target, encode(manifest))
    if not partial:
        path_of(manifest.hub_id, manifest.revision, partial=True).unlink(missing_ok=True)
        for left in target.parent.glob(f".{manifest.revision}.*.tmp"):  # of writers that were killed
            left.unlink(missing_ok=True)


def encode(manifest: Manifest) -> bytes:
    """Return the content of a manifest's file."""
    content = {
        "version": _VERSION,
        "hub_id": manifest.hub_id,
        "revision": manifest.revision,
        "files": {path: [file.size, file.checksum] for path, file in manifest.files.items()},
        "verified": sorted(manifest.verified),
    }
    return json.dumps(content, indent=1).encode()


def invalidate(manifest: Manifest, damaged: Iterable[str]) -> None:
    """Mark files as not verified: the revision is not served until they have been fetched again."""
    verified = manifest.verified - set(damaged)
    write(Manifest(manifest.hub_id, manifest.revision, manifest.files, verified), partial=True)
    path_of(manifest.hub_id, manifest.revision, partial=False).unlink(missing_ok=True)


def remove(hub_id: str, revision: str) -> None:
    """Delete a revision's manifests."""
    for partial in (False, True):
        path_of(hub_id, revision, partial=partial).unlink(missing_ok=True)


def list_managed() -> Iterator[tuple[str, str]]:
    """Return hub id and revision of all that this service fetched or began to fetch."""
    found = {}
    for path in sorted(hub_cache.hub_cache().glob(f"*--*/{_FOLDER}/*.json")):
        if manifest := _load(path):
            found[manifest.hub_id, manifest.revision] = True
    return iter(found)


def path_of(hub_id: str, revision: str, *, partial: bool) -> Path:
    """Return the file of a revision's manifest."""
    return hub_cache.repository(hub_id) / _FOLDER / f"{revision}{'.partial' if partial else ''}.json"


def _load(path: Path) -> Manifest | None:
    try:
        content = json.loads(path.read_text())
        if content["version"] != _VERSION:
            return None
        files = {name: File(size, checksum) for name, (size, checksum) in content["files"].items()}
        return Manifest(content["hub_id"], content["revision"], files, frozenset(content["verified"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
