"""Turns errors of the disk that holds the hub cache into errors with a next step."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import DiskSpaceError, WeightsError
from service.weights.files import RepositorySpec
from service.weights.hub_cache import hub_cache

_FULL = {
    errno.ENOSPC: "is full",
    errno.EDQUOT: "has used up its quota",
    errno.EFBIG: "does not accept a file of this size",
}


@contextmanager
def translate_disk_errors(repository: RepositorySpec) -> Iterator[None]:
    """Turn an OSError raised while a repository is written into an error with the next step.

    Raises:
        DiskSpaceError: The disk or the volume is full.
        WeightsError: Any other OSError.
    """
    try:
        yield
    except OSError as error:
        if reason := disk_full_reason(error):
            raise disk_space_error(repository, reason) from error
        raise WeightsError(
            f"{repository.label} cannot be written to {hub_cache()}: {error}.",
            hint="Make that directory writable, or set HF_HOME to another one.",
        ) from error


def disk_space_error(repository: RepositorySpec, reason: str) -> DiskSpaceError:
    """Return the error for a disk that became full during a download."""
    return DiskSpaceError(
        f"{hub_cache()} {reason} ({shutil.disk_usage(hub_cache()).free / 1e9:.1f} GB free) and {repository.label} is "
        "not complete.",
        hint="Free disk space, or set HF_HOME to a directory on a larger disk. Finished files are kept: start again.",
    )


def disk_full_reason(error: BaseException | None) -> str | None:
    """Return why nothing more could be written, as the end of a sentence; None if the error has another cause."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return _FULL[error.errno]
        if isinstance(error, RuntimeError):  # hf-xet gives a text and no errno
            for number, reason in _FULL.items():
                if os.strerror(number).lower() in str(error).lower():
                    return reason
        error = error.__cause__
    return None
