"""Leases that containers and commands share, in one Dict of a workspace."""

from __future__ import annotations

import os
from collections.abc import Callable

import modal

from service.weights.locks import EXPIRY_S, Lease

LOCKS = "vllm-locks"


def shared_lease(volume_prefix: str | None, expiry_s: float) -> Lease:
    """Return a lease that goes with no volume.

    Args:
        volume_prefix: What the names of the service's volumes, and of the Dict, begin with.
        expiry_s: After how long without a renewal it expires.
    """
    return Lease(_dict(volume_prefix), expiry_s=expiry_s)


def volume_lease(volume: modal.Volume, volume_prefix: str | None, commit: Callable[[], None] | None = None) -> Lease:
    """Return a lease whose holder sees what others have committed to a volume, and commits before releasing it.

    Args:
        volume: The volume.
        volume_prefix: What its name, and that of the Dict, begins with.
        commit: Commits it; None: as Modal's client does.
    """
    return Lease(
        _dict(volume_prefix),
        on_acquired=volume.reload,
        before_release=commit or volume.commit,
        expiry_s=float(os.environ.get("LEASE_EXPIRY_S", EXPIRY_S)),  # the tests of a dead holder wait for less
    )


def _dict(volume_prefix: str | None) -> Callable[[], modal.Dict]:
    return lambda: modal.Dict.from_name(f"{volume_prefix or ''}{LOCKS}", create_if_missing=True)
