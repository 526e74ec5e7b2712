"""Modal's volumes: what a commit that fails is to the service."""

from __future__ import annotations

from typing import Any

import modal
import pytest
from grpclib.exceptions import StreamTerminatedError

from service.volumes import commit_with_open_files


class FailingVolume:
    """A volume that cannot be committed."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def commit(self) -> None:
        """Fail."""
        raise self._error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("conflict"),
        modal.exception.ServiceError("internal"),
        StreamTerminatedError("Connection lost"),
        TimeoutError("time"),
        ValueError("open files"),
    ],
)
def test_commit_that_fails_is_an_os_error(error: Exception) -> None:
    """Whatever Modal's client raises: what writes to a disk that fails can go on later."""
    volume: Any = FailingVolume(error)

    with pytest.raises(OSError, match=str(error)):
        commit_with_open_files(volume)


def test_commit_with_open_files_is_done() -> None:
    """Only the reload after it has failed."""
    volume: Any = FailingVolume(RuntimeError("there are open files preventing the operation"))

    commit_with_open_files(volume)
