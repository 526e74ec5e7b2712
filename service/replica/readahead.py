"""Reads a model's weights into the page cache while the engine imports, so that its loader finds them in memory.

Never fails or delays a boot. It really reads: gVisor, Modal's runtime, ignores advice to do so. Source:
google/gvisor, pkg/sentry/syscalls/linux, `Fadvise64` ("currently ignores the provided advice"), `Readahead` (EINVAL).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from service.memory import available_bytes
from service.replica.page_cache import is_cached

# vLLM prefetches with 8; on two cores, beside 2.7 GB from a disk, imports took 1.2 s longer with 8, 0.3 s with 2.
THREADS = max(min(os.cpu_count() or 2, 8), 2)
PIECE = 1024**2  # stays in a core's cache: files in memory are read at 15 GB/s, with pieces of 16 MiB at 10
STRETCH, PROBES = 16 * PIECE, 8  # what is looked up in the page cache at a time, and at how many offsets
_log = logging.getLogger(__name__)


class Readahead:
    """One pass over the weights of a model and of its draft, in daemon threads.

    Several files are read at a time, a single one in several parts: under gVisor a file may serve one read at a time.
    Each part is opened once: a FUSE file system may drop a file's pages whenever it is opened (FOPEN_KEEP_CACHE).
    What cannot be read is logged at level DEBUG and passed over: the engine's loader reports it better.

    Args:
        directories: The model's and its draft's, in the order of loading; None stands for none.
        memory_share: How much of the available memory to fill: more would push out what was read first.
    """

    def __init__(self, *directories: Path | None, memory_share: float = 0.8) -> None:
        self.bytes_read = self.bytes_cached = 0  # so far; cached: passed over, because they are in memory already
        self._directories, self._memory_share = directories, memory_share
        self._parts = self._plan()  # runs when the first thread asks
        self._lock, self._halt = threading.Lock(), threading.Event()
        self._threads = [threading.Thread(target=self._work, name="readahead", daemon=True) for _ in range(THREADS)]

    def start(self) -> None:
        """Begin. Returns at once: only the threads touch a file."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End it within 0.1 s; a thread that hangs in a read is left to end with the process. Idempotent."""
        self._halt.set()
        deadline = time.monotonic() + 0.1
        for thread in self._threads:
            if thread.is_alive():  # one that is not started yet cannot be joined: `start` may be under way elsewhere
                thread.join(max(deadline - time.monotonic(), 0))

    def _work(self) -> None:
        with contextlib.suppress(OSError):  # Linux takes it for this thread alone: the engine's imports go first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        buffer = memoryview(bytearray(PIECE))
        while not self._halt.is_set() and (part := self._next()):
            with _logging_failure_of(part[0]):
                self._read(*part, buffer)

    def _next(self) -> tuple[Path, int, int] | None:
        with self._lock, _logging_failure_of(Path("/proc/meminfo")):
            return next(self._parts, None)
        return None

    def _plan(self) -> Iterator[tuple[Path, int, int]]:
        """Yield files or parts of them, with begin and end, as far as the memory goes."""
        files: dict[Path, int] = {}
        for directory in filter(None, self._directories):
            with _logging_failure_of(directory):
                for file in weight_files(directory):
                    with _logging_failure_of(file):
                        status = file.stat()
                        files |= {file: status.st_size} if stat.S_ISREG(status.st_mode) else {}
        room = int(available_bytes() * self._memory_share)
        for file, size in files.items():
            length = min(size, room)
            room -= length
            step = max(-(-length // max(THREADS // len(files), 1)), STRETCH)
            yield from ((file, begin, min(begin + step, length)) for begin in range(0, length, step))

    def _read(self, file: Path, begin: int, end: int, buffer: memoryview) -> None:
        with file.open("rb", buffering=0) as opened:
            for stretch in range(begin, end, STRETCH):
                if not self._halt.is_set():
                    self._read_stretch(opened.fileno(), stretch, min(stretch + STRETCH, end), buffer)

    def _read_stretch(self, fd: int, at: int, end: int, buffer: memoryview) -> None:
        if is_cached(fd, at, end, STRETCH // PROBES):
            with self._lock:
                self.bytes_cached += end - at
            return
        while at < end and not self._halt.is_set():
            if not (read := os.preadv(fd, [buffer[: end - at]], at)):
                raise EOFError(f"it ended at byte {at}: it was made shorter meanwhile")
            with self._lock:
                self.bytes_read += read
            at += read


@contextlib.contextmanager
def _logging_failure_of(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever is wrong with a file, the engine reports it better
        _log.debug("%s was not read ahead: %r", path, error)


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files that the engine's loader reads, in its order. Looks at names and the index.

    Source: vLLM 0.32, `DefaultModelLoader._prepare_weights` (`consolidated` files, Mistral's, go before all others),
    `filter_duplicate_safetensors_files` (an index leaves out what it does not name) and `_natural_sort_key`.

    Raises:
        OSError: The directory or its index cannot be read.
        ValueError: The index is not one.
    """
    names = [entry.name for entry in os.scandir(directory) if entry.name.endswith(".safetensors")]
    consolidated = [name for name in names if name.startswith("consolidated")]
    index = directory / f"{'consolidated' if consolidated else 'model'}.safetensors.index.json"
    wanted = _indexed_names(index) if index.is_file() else set(names)
    chosen = [name for name in consolidated or names if name in wanted]
    return [directory / name for name in sorted(chosen, key=_natural_order)]


def _indexed_names(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text())["weight_map"].values())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} has no weight_map of names and files") from error


def _natural_order(name: str) -> list[int | str]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
