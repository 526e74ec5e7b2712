"""Pins entries without a revision: asks the hub for newest commits and writes the lock file. Downloads nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from service.errors import ServiceError
from service.registry.models import Registry
from service.weights import revisions
from service.weights.files import is_upload


@dataclass(frozen=True)
class Pins:
    """The result of `pin`.

    Attributes:
        file: The lock file.
        pinned: Hub id -> commit that was written.
        failed: Hub id -> why the hub named no commit.
    """

    file: Path
    pinned: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def pin(registry: Registry, models_file: str | None) -> Pins:
    """Write the newest commit of every repository that neither its entry nor a lock file pins. Blocks.

    Args:
        registry: With the revisions of the lock files.
        models_file: The lock file is beside it; None: beside the built-in registry.

    Raises:
        RegistryError: The existing lock file is wrong.
        ServiceError: The lock file cannot be written.
    """
    pins = Pins(revisions.lock_file(models_file))
    resolve = revisions.RevisionResolver()
    names = dict.fromkeys(hub_id for spec in registry.specs.values() for hub_id in revisions.unpinned(spec))
    for hub_id in (name for name in names if not is_upload(name)):
        try:
            pins.pinned[hub_id] = resolve(hub_id)
        except ServiceError as error:
            pins.failed[hub_id] = str(error)
    if pins.pinned:
        try:
            revisions.record(pins.file, pins.pinned)
        except OSError as error:
            raise ServiceError(
                f"Lock file '{pins.file}' cannot be written: {error.strerror}.",
                hint="Copy the models into a file of yours and name it in SERVICE_MODELS_FILE, "
                "or write the revisions into its entries.",
            ) from error
    return pins
