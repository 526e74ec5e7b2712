"""Uploads: models and adapters that `vllm-service upload` put into the hub cache of Modal's volume, by name.

They lie there as a repository does, `uploads--<name>/snapshots/<revision>`, with plain files in place of links, and so
the cache, its manifests and `--verify` treat them as what a hub sent. A revision is a digest of names, sizes and
checksums. The partial manifest comes with the upload and lists all files; the first one to fetch verifies them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from service.errors import UsageError, WeightsError
from service.registry.entries import KEY, MAX_UPLOAD_NAME, UPLOADS
from service.weights import adapters, hub_cache, manifest
from service.weights.files import RepositorySpec, label
from service.weights.manifest import File, Manifest
from service.weights.reach import Unreachable

if TYPE_CHECKING:
    from service.registry.models import ModelSpec
    from service.weights.model_directory import ModelDirectory

ON_VOLUME = "hub"  # the hub cache, from the root of its volume


class Uploads:
    """`service.weights.hub.Hub` for uploads: what is not in the cache, nobody can send."""

    @property
    def url(self) -> str:
        """Where they are."""
        return str(hub_cache.hub_cache())

    def why_unreachable(self) -> Unreachable | None:
        """Return None: it is a directory."""
        return None

    def resolve(self, hub_id: str) -> str:
        """Return the newest revision."""
        if revision := hub_cache.newest_known(hub_id):
            return revision
        raise _absent(RepositorySpec(hub_id))

    def list_files(self, repository: RepositorySpec) -> Manifest:
        """Return a revision's files, as they were uploaded."""
        hub_id, revision = repository.hub_id, repository.revision or self.resolve(repository.hub_id)
        if found := manifest.read_all_verified(hub_id, revision):
            return Manifest(hub_id, revision, found.files)
        raise _absent(repository)

    def download(
        self,
        repository: RepositorySpec,
        revision: str,
        paths: Sequence[str],
        received_bytes: Callable[[], int],  # noqa: ARG002 - nothing is received
    ) -> None:
        """Refuse: these files are missing, or were found damaged and removed."""
        name = label(repository.hub_id)
        raise WeightsError(
            f"Missing or damaged: {len(paths)} of the files of {name} at revision {revision}: {', '.join(paths)}.",
            hint=f"Upload it again, which sends only these: {command(repository.hub_id)}.",
        )


def repository_of(name: str) -> str:
    """Return the hub id of an upload."""
    return f"{UPLOADS}:{name}"


def revision_of(files: Mapping[str, File]) -> str:
    """Return the revision of these files: 40 digits of the SHA-256 of their names, sizes and checksums."""
    listed = {path: [file.size, file.checksum] for path, file in files.items()}
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()[:40]


def name_for(directory: Path, given: str | None) -> str:
    """Return the name of an upload: the given one, or that of its directory.

    Raises:
        UsageError: It cannot be one.
    """
    if given is None:
        letters = (letter if letter.isascii() and letter.isalnum() else "-" for letter in directory.resolve().name)
        given = "".join(letters).lower().strip("-")
    if re.fullmatch(KEY, given) and len(given) <= MAX_UPLOAD_NAME:
        return given
    raise UsageError(
        f"'{given}' cannot be the name of an upload: it takes 1 to {MAX_UPLOAD_NAME} of a to z, 0 to 9, '.' and '-'.",
        hint="Give one with --name.",
    )


def entry(directory: ModelDirectory, name: str, revision: str) -> str:
    """Return what a models file says of an upload."""
    source = f'volume = "{name}"\nrevision = "{revision}"'
    if directory.lora_rank:
        limit = adapters.least_limit(directory.lora_rank)
        wider = f"[models.<key>]\nmax_lora_rank = {limit}\n\n" if directory.lora_rank > adapters.DEFAULT else ""
        return f'{wider}[[models.<key>.adapters]]\nname = "{name}"\n{source}'
    key = f'"{name}"' if "." in name else name
    return f"[models.{key}]\n{source}\nweights_gb = {max(directory.weights_gb, 0.001):.3f}"


def check_entries(directory: ModelDirectory, name: str, specs: Iterable[ModelSpec]) -> None:
    """Refuse an adapter that an entry names and whose engine would not serve it.

    Raises:
        UsageError: Its rank is above what the entry says.
    """
    hub_id = repository_of(name)
    for spec in specs:
        if directory.lora_rank and any(adapter.repository == hub_id for adapter in spec.adapters):
            try:
                adapters.check_rank(directory.lora_rank, f"'{directory.path}'", spec)
            except WeightsError as error:
                raise UsageError(error.message, hint=error.hint) from error


def _absent(repository: RepositorySpec) -> WeightsError:
    revisions = [revision for hub_id, revision in manifest.list_managed() if hub_id == repository.hub_id]
    has = f" Its revisions there: {', '.join(revisions)}." if revisions else ""
    return WeightsError(
        f"There is no {repository.label} in {hub_cache.hub_cache()}.{has}",
        hint=f"Put it on Modal's volume: {command(repository.hub_id)}. On this machine serve its directory: "
        "vllm-service up DIR.",
    )


def command(hub_id: str) -> str:
    """Return the command that makes an upload."""
    return f"vllm-service upload DIR --name {hub_id.partition(':')[2]}"
