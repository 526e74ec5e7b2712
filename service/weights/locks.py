"""One fetch of a repository at a time: who comes second waits, and then finds it done.

`Lock` is what a fetch asks for; `FlockLock` keeps processes of one machine apart. It does not reach from container to
container: on Modal another `Lock` does (`service.modal_app.prefetch`).
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Protocol

from service.errors import WeightsError
from service.weights import manifest

# Network file systems that know no locks. The hub's client is sound without: two only fetch the same twice.
_NO_LOCKS = {errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK}


class Lock(Protocol):
    """Keeps two from fetching one repository at once."""

    def held(self, hub_id: str, say: Callable[[str], None]) -> AbstractContextManager[None]:
        """Wait until the repository is this process's alone, and keep it so while the block lasts.

        Args:
            hub_id: The repository.
            say: Called once with a sentence when another has it.
        """


class FlockLock:
    """A lock of the kernel's on a file in the cache; it ends with its holder, however that dies."""

    @contextmanager
    def held(self, hub_id: str, say: Callable[[str], None]) -> Iterator[None]:
        """Wait until no other process of this machine fetches the repository."""
        with _opened(manifest.locks(hub_id)) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"Another process is fetching {hub_id}; waiting until it is done or gone.")
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            yield


def _opened(directory: Path) -> IO[str]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return (directory / "vllm-service.lock").open("w")
    except OSError as error:
        raise WeightsError(
            f"The cache '{manifest.hub_cache()}' cannot be written: {error.strerror}. Point HF_HOME at one that can."
        ) from error
