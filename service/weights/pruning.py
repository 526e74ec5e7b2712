"""Removes revisions that no registry entry names. Only what this service fetched: other programs use the cache too.

The newest revision of an upload stays: it cannot be fetched again.

huggingface_hub deletes (`DeleteCacheStrategy`, in `huggingface.delete`): it knows which contents several repositories
share. What to delete is decided here: its `scan_cache_dir().delete_revisions` reads the whole cache, and takes a commit
alone, which two repositories may have in common.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from service.weights import hub_cache, huggingface, manifest
from service.weights.files import RepositorySpec, is_upload
from service.weights.locks import LocalLock


def prune(keep: Iterable[RepositorySpec]) -> list[tuple[str, str, int]]:
    """Remove every managed revision that is not in `keep`; return hub id, revision and freed bytes of each.

    An entry without a revision keeps all revisions of its repository. Contents that another revision has too are kept.
    """
    kept = {(repository.hub_id.lower(), repository.revision) for repository in keep}
    removed = []
    for hub_id, revision in manifest.list_managed():
        if (hub_id.lower(), revision) in kept or (hub_id.lower(), None) in kept:
            continue
        if is_upload(hub_id) and revision == hub_cache.newest_known(hub_id):
            continue
        with LocalLock().held(hub_id):
            removed.append((hub_id, revision, _remove(hub_id, revision)))
    return removed


def _remove(hub_id: str, revision: str) -> int:
    folder, directory = hub_cache.repository(hub_id), hub_cache.snapshot(hub_id, revision)
    others = [other for other in (folder / "snapshots").glob("*") if other != directory]
    blobs = _blobs(directory).difference(*map(_blobs, others))
    plain = {path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()}  # an upload's
    freed = sum(file.stat().st_size for file in blobs | plain)
    manifest.remove(hub_id, revision)  # first: nothing finds the revision while it is being deleted
    huggingface.delete(
        hub_cache.hub_cache(),
        blobs=blobs,
        refs=_refs(folder, revision),
        repositories=() if others else (folder,),
        snapshots=(directory,) if directory.is_dir() else (),
        files=(hub_cache.listing(hub_id, revision),),
    )
    return freed


def _blobs(directory: Path) -> set[Path]:
    """Return the contents that a snapshot's links name; one that repositories share is itself a link."""
    links = [path for path in directory.rglob("*") if path.is_symlink() and path.exists()]
    return {Path(os.path.normpath(path.parent / path.readlink())) for path in links}


def _refs(folder: Path, revision: str) -> list[Path]:
    refs = [path for path in (folder / "refs").rglob("*") if path.is_file()]
    return [path for path in refs if path.read_text().strip() == revision]
