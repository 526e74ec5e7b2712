"""One repository from the hub into the cache: list, download what is missing, verify, write the manifest.

Runs in the child of `download_process`. Files are verified on threads of their own while others still arrive, and each
that has the hub's checksum is kept in the partial manifest: after an interruption it is neither downloaded nor read
again.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from service.errors import WeightsError
from service.files import atomic_write
from service.hardware import check_disk_space
from service.weights import checksums, hub_cache, manifest
from service.weights.disk_errors import translate_disk_errors
from service.weights.files import RepositorySpec, check_adapter, check_safetensors, label
from service.weights.hub import Hub, hub_for
from service.weights.manifest import File, Manifest
from service.weights.progress import Progress

_log = logging.getLogger(__name__)
POLL_S = 0.05
VERIFIERS = 2


def download(repository: RepositorySpec, on_progress: Callable[[Progress], None] = lambda _: None) -> Path:
    """Bring what the engine reads into the cache, and return its directory once all of it is verified.

    Raises:
        GatedModelError: The hub wants a token of an account that accepted the model's licence.
        DiskSpaceError: The cache has too little room for what is missing, or became full.
        WeightsError: The hub cannot be reached, has no such repository or revision, broke off, or sends files that
            are not what it lists.
    """
    hub = hub_for(repository.hub_id)
    with translate_disk_errors(repository):
        return _Download(hub, repository, hub.list_files(repository), on_progress).run()


class _Download:
    def __init__(
        self, hub: Hub, repository: RepositorySpec, listed: Manifest, on_progress: Callable[[Progress], None]
    ) -> None:
        self.hub, self.repository, self.listed, self.on_progress = hub, repository, listed, on_progress
        self.directory = hub_cache.snapshot(listed.hub_id, listed.revision)
        self.blobs = hub_cache.blobs(listed.hub_id)
        self.files = listed.select(repository)
        self.total = sum(file.size for file in self.files.values())
        self._changing = threading.Lock()
        known = manifest.read_all_verified(listed.hub_id, listed.revision)
        verified = known.verified & listed.files.keys() if known else frozenset()
        self.manifest = replace(listed, verified=frozenset(filter(self._is_whole, verified)))
        self._hashed_bytes = sum(file.size for path, file in self.files.items() if path in self.manifest.verified)

    def run(self) -> Path:
        if self.repository.is_adapter:
            check_adapter(self.listed.files, self.repository.label)
        if not self.files:
            raise WeightsError(
                f"{self.repository.label} has no file that the engine reads.", hint="Correct the entry's hub_id."
            )
        check_safetensors(self.listed.files, self.repository.label)
        hub_cache.remove_unfinished(self.listed.hub_id)
        for path in self.files:
            if not self._is_whole(path):  # torn or missing
                _discard(self.directory / path)
        were_here = self.files.keys() - self._absent()
        missing = sum(self.files[path].size - self._present(self.files[path]) for path in self._absent())
        check_disk_space(
            hub_cache.hub_cache(), missing / 1e9, self.listed.hub_id, "set HF_HOME to a directory on a larger disk"
        )
        manifest.write(self.manifest, partial=True)
        if missing:
            _log.info("Fetching %s: %.1f GB", self.repository.label, missing / 1e9)
        attempts: Counter[str] = Counter()
        while mismatches := self._round():
            for path, reason in mismatches.items():
                _discard(self.directory / path)
                attempts[path] += 1
                if attempts[path] > 1 + (path in were_here):  # it was downloaded twice, and was wrong twice
                    raise WeightsError(
                        f"{path} of {self.repository.label} {reason}, again and again. The hub, or a proxy on the way, "
                        "sends something other than the hub lists.",
                        hint="Start again later; the other files are kept.",
                    )
                _log.warning("%s of %s %s; it is fetched again.", path, label(self.repository.hub_id), reason)
        self._remember_newest()
        manifest.write(self.manifest)
        return self.directory

    def _round(self) -> dict[str, str]:
        """Download what is absent, verify what is not verified yet, and return which files are wrong, and why."""
        mismatches: dict[str, str] = {}
        checks: list[Future[None]] = []
        all_here = threading.Event()
        with self._reporting(all_here), ThreadPoolExecutor(VERIFIERS, thread_name_prefix="verify") as pool:
            checking = threading.Thread(target=self._check_as_they_come, args=(pool, all_here, mismatches, checks))
            checking.start()
            try:
                if absent := self._absent():
                    self.hub.download(self.repository, self.listed.revision, absent, self._bytes_here)
            finally:
                all_here.set()
                checking.join()
        for check in checks:
            check.result()
        return mismatches

    def _check_as_they_come(
        self,
        pool: ThreadPoolExecutor,
        all_here: threading.Event,
        mismatches: dict[str, str],
        checks: list[Future[None]],
    ) -> None:
        """Verify each file once it is whole: those that were here and those that come."""
        waiting = self.files.keys() - self.manifest.verified
        last = False
        while waiting and not last:
            last = all_here.wait(POLL_S)
            for path in [path for path in waiting if (self.directory / path).exists()]:
                waiting.discard(path)
                checks.append(pool.submit(self._check, path, mismatches))

    def _check(self, path: str, mismatches: dict[str, str]) -> None:
        reason = checksums.mismatch(self.directory / path, self.files[path], self._count)
        with self._changing:
            if reason:
                mismatches[path] = reason
                self._hashed_bytes -= self.files[path].size
                return
            self.manifest = replace(self.manifest, verified=self.manifest.verified | {path})
            manifest.write(self.manifest, partial=True)

    def _count(self, count: int) -> None:
        with self._changing:
            self._hashed_bytes += count

    def _absent(self) -> list[str]:
        """Return the files that are not in the snapshot, whole or torn."""
        return [path for path in self.files if not (self.directory / path).exists()]

    def _is_whole(self, path: str) -> bool:
        return hub_cache.has_size(self.directory / path, self.listed.files[path].size)

    def _present(self, file: File) -> int:
        """Return how much of an absent file's content the cache has already, for another revision."""
        return file.size if hub_cache.has_size(self.blobs / file.blob, file.size) else 0

    def _bytes_here(self) -> int:
        """Return the bytes of finished and unfinished files on the disk."""
        growing: Counter[str] = Counter()
        for part in self.blobs.glob("*.incomplete"):
            with suppress(OSError):
                status = part.stat()  # Xet may write behind a gap; some file systems tell no blocks
                size = min(status.st_size, status.st_blocks * 512) if status.st_blocks else status.st_size
                blob = part.name.partition(".")[0]
                growing[blob] = max(growing[blob], size)
        here = 0
        for path, file in self.files.items():
            is_whole = (self.directory / path).exists() or (self.blobs / file.blob).exists()
            here += file.size if is_whole else min(growing[file.blob], file.size)
        return here

    @contextmanager
    def _reporting(self, all_here: threading.Event) -> Iterator[None]:
        """Report progress five times a second while the block lasts."""
        ended = threading.Event()

        def report() -> None:
            while not ended.wait(4 * POLL_S):
                self.on_progress(self._progress(all_here.is_set()))

        thread = threading.Thread(target=report, name="progress")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.on_progress(self._progress(all_here.is_set()))

    def _progress(self, all_here: bool) -> Progress:
        verified = self.manifest.verified & self.files.keys()
        done = max(0, min(self._hashed_bytes, self.total)) if all_here else self._bytes_here()
        phase: Literal["fetching", "verifying"] = "verifying" if all_here else "fetching"
        return Progress(self.repository.hub_id, done, self.total, len(verified), len(self.files), phase)

    def _remember_newest(self) -> None:
        """Write down the newest revision's commit, as the client does: an entry without a pin is found by it."""
        if self.repository.revision is None:
            atomic_write(hub_cache.newest_ref(self.repository.hub_id), self.manifest.revision.encode())


def _discard(path: Path) -> None:
    """Delete a file's content with all links to it: the client downloads nothing that it finds by name."""
    while path.is_symlink():
        target = path.parent / path.readlink()
        path.unlink()
        path = target
    path.unlink(missing_ok=True)
