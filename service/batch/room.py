"""How much clients may still upload: bounds hold for uploads at once too, which none of them has on the disk yet."""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from service.batch import store as batch_store
from service.batch.store import MOST_FILES, ClientStore
from service.errors import one_line
from service.gateway.threads import in_thread
from service.in_engine.vllm_service.api_error import APIError
from service.in_engine.vllm_service.http_contract import MIB

AT_ONCE = 4  # uploads of a key
_FREE = 1024 * MIB  # bytes of the disk that uploads leave free: answers of batches need some
_RETRY_S = 5.0
_log = logging.getLogger(__name__)


@dataclass
class _ClientRoom:
    """What a client has: bytes of whole files, and what is arriving."""

    used: int = 0
    uploads: list[ArrivingUpload] = field(default_factory=list)


class ArrivingUpload:
    """The room of one upload.

    Args:
        client: What its client has beside it.
        directory: Gets it.
    """

    def __init__(self, client: _ClientRoom, directory: Path) -> None:
        self._client, self.directory = client, directory
        self._size, self.is_whole = 0, False

    def take(self, size: int) -> None:
        """Have room for further bytes.

        Raises:
            APIError: 413: there is none.
        """
        self._size += size
        if self._client.used + sum(upload._size for upload in self._client.uploads) > batch_store.QUOTA:
            raise _quota()

    def end(self) -> None:
        """Give the room back, or leave it to the file."""
        self._client.uploads.remove(self)
        self._client.used += self._size if self.is_whole else 0


class Rooms:
    """The rooms of all clients that are uploading."""

    def __init__(self) -> None:
        self._clients: dict[Path, _ClientRoom] = {}

    @asynccontextmanager
    async def upload(self, store: ClientStore) -> AsyncIterator[ArrivingUpload]:
        """Have room for a file; what has not arrived whole is removed at the end.

        Raises:
            APIError: 413: the client has too much; 429: too many uploads at once; 507: the disk is full.
        """
        client = self._clients.setdefault(store.directory, _ClientRoom())
        if len(client.uploads) >= AT_ONCE:
            message = f"The key '{store.owner}' has {AT_ONCE} uploads at once, which is the limit."
            raise APIError(429, f"{message} Send one after the other.", code="too_many_uploads", retry_after_s=_RETRY_S)
        upload = ArrivingUpload(client, store.upload_directory())
        client.uploads.append(upload)
        try:
            names = frozenset(one.directory.name for one in client.uploads)
            used = await in_thread(lambda: _check(store, len(names), store.used_bytes(besides=names)))
            client.used = used if len(client.uploads) == 1 else max(used, client.used)
            upload.take(1)
            upload.take(-1)
            yield upload
        finally:
            upload.end()
            if not client.uploads:
                del self._clients[store.directory]
            await in_thread(partial(shutil.rmtree, upload.directory, ignore_errors=True))


def check_disk(directory: Path) -> None:
    """Refuse what would fill the disk. Blocks.

    Raises:
        APIError: 507.
    """
    if 0 < shutil.disk_usage(directory).free < _FREE:  # 0: some network file systems do not tell; ENOSPC does
        raise _disk_full()


@contextmanager
def storing() -> Iterator[None]:
    """Answer a request whose file or batch cannot be kept.

    Raises:
        APIError: 507: the disk is full; 503: it or a volume fails now.
    """
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise _disk_full() from error
        _log.warning("A file or batch was not kept: %s", one_line(error))
        message = f"The service cannot write to its storage now. Send the request again in {_RETRY_S:.0f} s."
        raise APIError(503, message, code="storage_unavailable", retry_after_s=_RETRY_S) from error


def _disk_full() -> APIError:
    message = "The service's disk is full, and takes no file now. Its operator must make room."
    return APIError(507, message, code="disk_full")


def _check(store: ClientStore, uploads: int, used: int) -> int:
    if (count := len(store.files()) + uploads) > MOST_FILES:
        message = f"The key '{store.owner}' has {count - uploads} files. Delete some first."
        raise APIError(413, message, code="quota_exceeded")
    store.make_directory()
    check_disk(store.directory)
    return used


def _quota() -> APIError:
    message = f"The files of this key would have more than {batch_store.QUOTA // (1024 * MIB)} GiB, which is the limit."
    return APIError(413, f"{message} Delete some first.", code="quota_exceeded")
