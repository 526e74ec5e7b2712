"""What the service needs of a model hub, and which hub has a repository.

A second hub is one new module with a class that has these members, and one entry in `HUBS`: its repositories are then
written `<name>:<owner>/<repository>` in a registry entry's hub_id, and the class gets that whole hub_id. No other
module of `service.weights` asks a hub; `pruning` and `hub_cache` know the layout of the cache that all hubs share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from service.errors import UsageError, did_you_mean
from service.registry.entries import UPLOADS
from service.weights.files import RepositorySpec
from service.weights.huggingface import HuggingFace
from service.weights.manifest import Manifest
from service.weights.reach import Unreachable
from service.weights.uploads import Uploads


class Hub(Protocol):
    """A model hub. Methods block, may be called from several threads, and raise `ServiceError`s only."""

    @property
    def url(self) -> str:
        """The hub's address, for messages."""

    def why_unreachable(self) -> Unreachable | None:
        """Return why the hub does not answer within a few seconds; None when it does."""

    def resolve(self, hub_id: str) -> str:
        """Return the commit of a repository's newest revision.

        Raises:
            WeightsError: The hub cannot be reached, or has no such repository.
        """

    def list_files(self, repository: RepositorySpec) -> Manifest:
        """Return a revision's commit and all its files with sizes and checksums; none counts as verified.

        Raises:
            GatedModelError: The hub wants a token of an account that accepted the model's licence.
            WeightsError: The hub cannot be reached, or has no such repository or revision.
        """

    def download(
        self, repository: RepositorySpec, revision: str, paths: Sequence[str], received_bytes: Callable[[], int]
    ) -> None:
        """Put files into `hub_cache.snapshot`, each under its name once it is whole; keep those that are there.

        Args:
            repository: Which.
            revision: Its commit.
            paths: The files.
            received_bytes: Returns the bytes in the cache so far: an attempt that brought some is worth repeating.

        Raises:
            GatedModelError: The hub wants a token of an account that accepted the model's licence.
            DiskSpaceError: The disk is full.
            WeightsError: The hub cannot be reached, or the download broke off again and again.
        """


DEFAULT = HuggingFace()
HUBS: dict[str, Hub] = {"": DEFAULT, UPLOADS: Uploads()}


def hub_for(hub_id: str) -> Hub:
    """Return the hub that has a repository.

    Raises:
        UsageError: There is no hub of the name before the colon.
    """
    name = hub_id.rpartition(":")[0]
    if name not in HUBS:
        raise UsageError(
            f"hub_id '{hub_id}' names the hub '{name}', which is unknown.{did_you_mean(name, HUBS)}",
            hint="Correct the entry's hub_id; one without a colon is on Hugging Face.",
        )
    return HUBS[name]
