"""Removing revisions that no registry entry names. Only what this service fetched: the cache is the user's too."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from service.weights import manifest
from service.weights.files import Wanted
from service.weights.locks import FlockLock


def prune(keep: Iterable[Wanted], *, dry_run: bool = False) -> list[tuple[str, str, int]]:
    """Remove every marked revision that is not in `keep`; return hub id, revision and freed bytes of each.

    An entry without a revision keeps all of its repository's. Contents that another revision has too stay.
    """
    kept = {(wanted.hub_id.lower(), wanted.revision) for wanted in keep}
    removed = []
    for hub_id, revision in manifest.all_marked():
        if (hub_id.lower(), revision) in kept or (hub_id.lower(), None) in kept:
            continue
        with FlockLock().held(hub_id, lambda _: None):
            removed.append((hub_id, revision, _remove(hub_id, revision, dry_run=dry_run)))
    return removed


def _remove(hub_id: str, revision: str, *, dry_run: bool) -> int:
    from huggingface_hub import DeleteCacheStrategy  # noqa: PLC0415 - knows what repositories share

    folder, directory = manifest.repository(hub_id), manifest.snapshot(hub_id, revision)
    others = [other for other in (folder / "snapshots").glob("*") if other != directory]
    blobs = _blobs(directory).difference(*map(_blobs, others))
    freed = sum(blob.stat().st_size for blob in blobs)
    if not dry_run:
        manifest.remove(hub_id, revision)  # first: nobody finds what is about to go
        listing = folder / "trees" / f"{revision}.json"
        strategy = DeleteCacheStrategy(
            expected_freed_size=freed,
            blobs=frozenset(blobs),
            refs=frozenset(_refs(folder, revision)),
            repos=frozenset(() if others else (folder,)),
            snapshots=frozenset((directory,) if directory.is_dir() else ()),
            files=frozenset((listing,)),
            cache_dir=manifest.hub_cache(),
        )
        strategy.execute()
    return freed


def _blobs(directory: Path) -> set[Path]:
    """Return the contents that a snapshot's links name; one that repositories share is itself a link."""
    links = [path for path in directory.rglob("*") if path.is_symlink() and path.exists()]
    return {Path(os.path.normpath(path.parent / path.readlink())) for path in links}


def _refs(folder: Path, revision: str) -> list[Path]:
    refs = [path for path in (folder / "refs").rglob("*") if path.is_file()]
    return [path for path in refs if path.read_text().strip() == revision]
