"""Checksums: whether files on disk have the content that the hub lists. Reads them whole, on a few threads.

`HfApi.verify_repo_checksums` of huggingface_hub does the same on one thread, without progress, for one hub.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from service.weights.manifest import File
from service.weights.progress import Phase, Progress

_CHUNK = 1 << 20  # hashing releases the interpreter's lock; larger pieces were no faster


def checksum(path: Path, kind: str, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """Return the checksum of a file's content as the hub writes it.

    Args:
        path: The file.
        kind: `sha256` or `git`, see `File.checksum`.
        on_bytes: Called with the number of bytes of each piece, and with 0 at the end, from the thread that reads.

    Raises:
        OSError: The file cannot be read.
    """
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        if kind == "git":
            digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        else:
            digest = hashlib.sha256()
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            on_bytes(count)
    on_bytes(0)
    return f"{kind}:{digest.hexdigest()}"


def mismatch(path: Path, file: File, on_bytes: Callable[[int], None] = lambda _: None) -> str | None:
    """Return how a file differs from what is listed, as the end of a sentence; None where it does not."""
    try:
        size = path.stat().st_size
        if size != file.size:
            return f"has {size} bytes; {file.size} are expected"
        found = checksum(path, file.checksum.partition(":")[0], on_bytes)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if found == file.checksum:
        return None
    return f"is damaged: its checksum is {found[:19]}…; {file.checksum[:19]}… is expected"


def mismatches(
    directory: Path, files: Mapping[str, File], workers: int, on_bytes: Callable[[int], None] = lambda _: None
) -> dict[str, str]:
    """Return which files differ from what the hub lists, and how. Blocks until all were read."""
    largest_first = sorted(files, key=lambda path: -files[path].size)
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        found = pool.map(lambda path: mismatch(directory / path, files[path], on_bytes), largest_first)
        return {path: reason for path, reason in zip(largest_first, found, strict=True) if reason}


class ByteCounter:
    """Turns the bytes that several threads read into progress of one repository."""

    def __init__(
        self, hub_id: str, sizes: Collection[int], on_progress: Callable[[Progress], None], phase: Phase = "verifying"
    ) -> None:
        self._hub_id, self._files, self._on_progress, self._phase = hub_id, len(sizes), on_progress, phase
        self._total = sum(sizes)
        self._done = self._files_done = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count bytes; 0 is the end of a file."""
        with self._lock:
            self._done += count
            self._files_done += not count
            self._on_progress(
                Progress(self._hub_id, self._done, self._total, self._files_done, self._files, self._phase)
            )
