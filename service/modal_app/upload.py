"""Puts a model or an adapter on Modal's volume, into the hub cache that replicas read. Blocks.

Modal's client splits files into blocks of 8 MiB, asks which of them Modal lacks, and sends those: what another revision
or an interrupted upload has sent is not sent again. Each batch of files is on the volume once it is whole. The manifest
comes first, so that what was begun can be pruned; the note of the newest revision comes last, when all files are there.
"""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modal
from modal._utils.async_utils import synchronizer
from modal.volume import _AbstractVolumeUploadContextManager, _Volume, _VolumeUploadContextManager2

from service.errors import ServiceError
from service.modal_app import account
from service.registry.models import ModelSpec
from service.volumes import HUB_CACHE, volume_name
from service.weights import checksums, hub_cache, manifest, uploads
from service.weights.files import RepositorySpec, is_upload, label
from service.weights.manifest import File, Manifest
from service.weights.model_directory import ModelDirectory
from service.weights.progress import Progress

_BATCH_BYTES = 256 * 2**20
_READERS = 2
_BLOCKS_AT_ONCE = 16  # the client sends 128, and of 1 GiB that is under way at an interrupt all would be sent again
_CANCELLATIONS, _CANCEL_AGAIN_S = 50, 0.2  # of transfers after an interrupt: how often, and after how long again
OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Uploaded:
    """An upload that is on the volume.

    Attributes:
        hub_id: Its name as the cache has it.
        sent_bytes: What Modal lacked of it.
    """

    hub_id: str
    revision: str
    files: int
    size: int
    sent_bytes: int
    volume: str


def upload(directory: ModelDirectory, name: str, volume_prefix: str | None, on_progress: OnProgress) -> Uploaded:
    """Put a directory on the volume under a name; its revision is that of its content.

    Args:
        directory: What to upload.
        name: Of the upload; one with other content becomes another revision of it.
        volume_prefix: What the volume's name begins with.
        on_progress: Called while files are read and while they are sent, from threads.

    Raises:
        ServiceError: There is no account, Modal refused or did not answer, or a file has changed meanwhile.
        KeyboardInterrupt: It was interrupted; what was sent is kept.
    """
    hub_id, volume = uploads.repository_of(name), volume_name(HUB_CACHE, volume_prefix)
    account.check_environment()
    with account.translate_errors(f"open volume '{volume}'"):
        modal.Volume.from_name(volume, create_if_missing=True, version=2).hydrate()
    files = _checksums(name, directory, on_progress)
    revision = uploads.revision_of(files)
    with account.translate_errors(f"upload to volume '{volume}'"):
        listed = manifest.encode(Manifest(hub_id, revision, files))
        _put(volume, [(io.BytesIO(listed), _remote(manifest.path_of(hub_id, revision, partial=True)))], _ignore)
        snapshot, sent = hub_cache.snapshot(hub_id, revision), _Sent(name, files, on_progress)
        for batch in _batches(files):
            _put(volume, [(directory.path / path, _remote(snapshot / path)) for path in batch], sent.count)
            sent.finish(batch)
        _check(volume, _remote(snapshot), files)
        _put(volume, [(io.BytesIO(revision.encode()), _remote(hub_cache.newest_ref(hub_id)))], _ignore)
    return Uploaded(hub_id, revision, len(files), sent.total, sent.sent_bytes, volume)


def check(specs: Iterable[ModelSpec], volume_prefix: str | None) -> None:
    """Insist that the uploads that entries name are on the volume.

    Raises:
        ServiceError: One is not there, or has not the revision that its entry names.
    """
    volume = volume_name(HUB_CACHE, volume_prefix)
    for hub_id, revision in dict.fromkeys(one for spec in specs for one in spec.repositories if is_upload(one[0])):
        begin = _remote(hub_cache.repository(hub_id))
        with account.translate_errors(f"look for {label(hub_id)} on volume '{volume}'"):
            there = {path.removeprefix(f"{begin}/") for path in _list(volume, begin)}
        manifests = {path.rpartition("/")[2].partition(".")[0] for path in there if path.endswith(".json")}
        if not (revision in manifests if revision else "refs/main" in there):
            has = f" It has {', '.join(sorted(manifests))}." if manifests else ""
            raise ServiceError(
                f"There is no {RepositorySpec(hub_id, revision).label} on volume '{volume}'.{has}",
                hint=f"Put it there: {uploads.command(hub_id)}. --env and SERVICE_VOLUME_PREFIX choose the volume.",
            )


def _checksums(name: str, directory: ModelDirectory, on_progress: OnProgress) -> dict[str, File]:
    """Read all files; an interrupt ends that at once."""
    counter = checksums.ByteCounter(name, directory.files.values(), on_progress, "reading")
    ended = threading.Event()

    def count(number: int) -> None:
        if ended.is_set():
            raise InterruptedError("The upload was interrupted.")
        counter.add(number)

    def read(path: str) -> File:
        return File(directory.files[path], checksums.checksum(directory.path / path, "sha256", count))

    with ThreadPoolExecutor(_READERS, thread_name_prefix="checksum") as readers:
        futures = {path: readers.submit(read, path) for path in directory.files}
        try:
            return {path: future.result() for path, future in futures.items()}
        except BaseException:
            ended.set()
            readers.shutdown(wait=False, cancel_futures=True)
            raise


def _batches(files: dict[str, File]) -> Iterator[list[str]]:
    """Yield files in portions of 256 MiB, a larger file alone, small ones first."""
    batch: list[str] = []
    size = 0
    for path in sorted(files, key=lambda path: (files[path].size, path)):
        if batch and size + files[path].size > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(path)
        size += files[path].size
    yield batch


class _Sent:
    """Turns what Modal's client tells of a batch into progress of the whole upload."""

    def __init__(self, name: str, files: dict[str, File], on_progress: OnProgress) -> None:
        self._name, self._files, self._on_progress = name, files, on_progress
        self.total = sum(file.size for file in files.values())
        self.sent_bytes = self._done = self._files_done = self._in_batch = 0

    def count(self, *_: Any, advance: float | None = None, **__: Any) -> None:
        """Count bytes of the batch; negative ones are those of an attempt that failed."""
        self.sent_bytes += int(advance or 0)
        self._in_batch += int(advance or 0)
        self._show(self._done + self._in_batch)

    def finish(self, batch: list[str]) -> None:
        """Count a batch as done, whatever of it was sent."""
        self._done += sum(self._files[path].size for path in batch)
        self._files_done += len(batch)
        self._in_batch = 0
        self._show(self._done)

    def _show(self, done: int) -> None:
        shown = Progress(self._name, done, self.total, self._files_done, len(self._files), "uploading")
        self._on_progress(shown)


def _ignore(*_: Any, **__: Any) -> None:
    """Show no progress."""


@synchronizer.create_blocking
async def _put(volume: str, files: list[tuple[Path | io.BytesIO, str]], on_progress: Callable[..., None]) -> None:
    """Do as `modal volume put --force` does, whose progress the public call does not tell."""
    found = await _Volume.from_name(volume).hydrate()
    version = metadata.version if (metadata := found._get_metadata()) else 0
    sending = _AbstractVolumeUploadContextManager.resolve(
        version, found.object_id, found._client, on_progress, force=True
    )
    if isinstance(sending, _VolumeUploadContextManager2):
        sending._put_concurrency = _BLOCKS_AT_ONCE
    others = asyncio.all_tasks()
    task = asyncio.ensure_future(_send(sending, files))
    try:
        await asyncio.wait(
            {task}
        )  # not the task itself: the client may swallow a cancellation, and send all that is left
        task.result()
    except BaseException:  # the client lets its other transfers go on
        for _ in range(_CANCELLATIONS):
            if transfers := asyncio.all_tasks() - others:
                for transfer in transfers:
                    transfer.cancel()
                await asyncio.wait(transfers, timeout=_CANCEL_AGAIN_S)
        raise


async def _send(sending: Any, files: list[tuple[Path | io.BytesIO, str]]) -> None:
    async with sending as batch:
        for source, remote in files:
            batch.put_file(source, remote, mode=0o644)


def _list(volume: str, directory: str) -> dict[str, int]:
    """Return path -> size of the files in a directory of a volume; none where there is no such directory."""
    with suppress(modal.exception.NotFoundError, FileNotFoundError):
        return {entry.path: entry.size for entry in modal.Volume.from_name(volume).iterdir(directory)}
    return {}


def _check(volume: str, snapshot: str, files: dict[str, File]) -> None:
    there = _list(volume, snapshot)
    if missing := [path for path, file in files.items() if there.get(f"{snapshot}/{path}") != file.size]:
        raise ServiceError(
            f"Not on volume '{volume}' as they were read here: {', '.join(missing)}.",
            hint="They have changed, or were removed there, meanwhile. Upload again: only what is missing is sent.",
        )


def _remote(path: Path) -> str:
    """Return where a path of this machine's hub cache is on the volume."""
    return f"{uploads.ON_VOLUME}/{path.relative_to(hub_cache.hub_cache())}"
