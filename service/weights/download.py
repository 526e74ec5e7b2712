"""One repository from the hub into the cache: plan, fetch what is missing, verify, mark. Runs in the child of `fetch`.

Files are verified on threads of their own while others still arrive, and each that is found to be what the hub says is
kept in the partial marker: an interrupted fetch neither fetches nor reads it again.
"""

from __future__ import annotations

import fcntl
import glob
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from service.errors import WeightsError
from service.hardware import check_disk_space
from service.weights import checksums, huggingface, manifest
from service.weights.files import Wanted
from service.weights.huggingface_errors import endpoint, explained
from service.weights.manifest import File, Marker
from service.weights.progress import Progress

POLL_S = 0.05
VERIFIERS = 2


def download(
    wanted: Wanted,
    token: str | None,
    say: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Path:
    """Bring what the engine reads into the cache, and return its directory once all of it is verified.

    Raises:
        GatedModelError: The hub wants a token of somebody who accepted the model's licence.
        DiskSpaceError: The cache has too little room for what is missing, or got full.
        WeightsError: The hub cannot be reached, has no such repository or revision, broke off, or sends files that
            are not what it lists.
    """
    with explained(wanted, token), huggingface.connected(say):
        return _Download(wanted, huggingface.plan(wanted, token, say), token, say, on_progress).run()


class _Download:
    def __init__(
        self,
        wanted: Wanted,
        listed: Marker,
        token: str | None,
        say: Callable[[str], None],
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.wanted, self.listed, self.token, self.say, self.on_progress = wanted, listed, token, say, on_progress
        self.directory = manifest.snapshot(listed.hub_id, listed.revision)
        self.blobs = manifest.repository(listed.hub_id) / "blobs"
        self.files = listed.chosen(wanted)
        self.total = sum(file.size for file in self.files.values())
        self._changing = threading.Lock()
        known = manifest.known(listed.hub_id, listed.revision)
        verified = known.verified & listed.files.keys() if known else frozenset()
        self.marker = replace(listed, verified=frozenset(filter(self._is_whole, verified)))
        self._hashed_bytes = sum(file.size for path, file in self.files.items() if path in self.marker.verified)

    def run(self) -> Path:
        if not self.files:
            raise WeightsError(f"{self.wanted.at} has no file that the engine reads. Correct the entry's hub_id.")
        _sweep(self.blobs, manifest.locks(self.marker.hub_id))
        for path in self.files:
            if not self._is_whole(path):  # torn or missing
                _discard(self.directory / path)
        were_here = self.files.keys() - self._absent()
        missing = sum(self.files[path].size - self._present(self.files[path]) for path in self._absent())
        check_disk_space(
            manifest.hub_cache(), missing / 1e9, self.wanted.hub_id, "set HF_HOME to a directory on a larger disk"
        )
        manifest.write(self.marker, partial=True)
        self.say(f"Fetching {self.wanted.at}: {missing / 1e9:.1f} GB")
        blamed: Counter[str] = Counter()
        while faults := self._round():
            for path, why in faults.items():
                _discard(self.directory / path)
                blamed[path] += 1
                if blamed[path] > 1 + (path in were_here):  # it came twice, and twice so
                    raise WeightsError(
                        f"{path} of {self.wanted.at} {why}, again and again. The hub, or what lies between, sends "
                        "something else than it lists. Start again later; the other files are kept."
                    )
                self.say(f"{path} of {self.wanted.hub_id} {why}; it is fetched again.")
        self._remember_newest()
        manifest.write(self.marker)
        return self.directory

    def _round(self) -> dict[str, str]:
        """Fetch what is absent, verify what is not verified yet, and return what is not as the hub says."""
        faults: dict[str, str] = {}
        checks: list[Future[None]] = []
        all_here = threading.Event()
        with self._reporting(all_here), ThreadPoolExecutor(VERIFIERS, thread_name_prefix="verify") as pool:
            checking = threading.Thread(target=self._check_as_they_come, args=(pool, all_here, faults, checks))
            checking.start()
            try:
                if self._absent():
                    huggingface.patiently(self._fetch, self._bytes_here)
            finally:
                all_here.set()
                checking.join()
        for check in checks:
            check.result()
        return faults

    def _fetch(self) -> None:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - only hub models need it

        absent = self._absent()
        snapshot_download(
            self.marker.hub_id,
            revision=self.marker.revision,
            cache_dir=manifest.hub_cache(),
            endpoint=endpoint(),
            allow_patterns=[glob.escape(path) for path in absent],
            token=self.token,
        )
        if absent := self._absent():  # the client takes an outage for a reason to make do with what is there
            raise OSError(f"{len(absent)} of {len(self.files)} files have not come, such as {absent[0]}.")

    def _check_as_they_come(
        self,
        pool: ThreadPoolExecutor,
        all_here: threading.Event,
        faults: dict[str, str],
        checks: list[Future[None]],
    ) -> None:
        """Verify each file once it is whole: those that were here and those that come."""
        waiting = self.files.keys() - self.marker.verified
        last = False
        while waiting and not last:
            last = all_here.wait(POLL_S)
            for path in [path for path in waiting if (self.directory / path).exists()]:
                waiting.discard(path)
                checks.append(pool.submit(self._check, path, faults))

    def _check(self, path: str, faults: dict[str, str]) -> None:
        why = checksums.fault(self.directory / path, self.files[path], self._count)
        with self._changing:
            if why:
                faults[path] = why
                self._hashed_bytes -= self.files[path].size
                return
            self.marker = replace(self.marker, verified=self.marker.verified | {path})
            manifest.write(self.marker, partial=True)

    def _count(self, count: int) -> None:
        with self._changing:
            self._hashed_bytes += count

    def _absent(self) -> list[str]:
        """Return the files that are not here, in whatever state."""
        return [path for path in self.files if not (self.directory / path).exists()]

    def _is_whole(self, path: str) -> bool:
        return manifest.has_size(self.directory / path, self.listed.files[path].size)

    def _present(self, file: File) -> int:
        """Return how much of an absent file's content is here nevertheless, under another revision's name."""
        return file.size if manifest.has_size(self.blobs / file.blob, file.size) else 0

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
        """Tell how far it is, five times a second, while the block lasts."""
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
        verified = self.marker.verified & self.files.keys()
        done = max(0, min(self._hashed_bytes, self.total)) if all_here else self._bytes_here()
        phase: Literal["fetching", "verifying"] = "verifying" if all_here else "fetching"
        return Progress(self.wanted.hub_id, done, self.total, len(verified), len(self.files), phase)

    def _remember_newest(self) -> None:
        """Write down which commit the newest is, as the client does: an entry without a pin is found by it."""
        if self.wanted.revision is None:
            ref = manifest.repository(self.wanted.hub_id) / "refs" / "main"
            ref.parent.mkdir(parents=True, exist_ok=True)
            draft = ref.with_name("main.vllm-service.tmp")
            draft.write_text(self.marker.revision)
            draft.replace(ref)


def _discard(path: Path) -> None:
    """Delete a file's content with all links to it: the client fetches nothing that it finds by name."""
    while path.is_symlink():
        target = path.parent / path.readlink()
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def _sweep(blobs: Path, locks: Path) -> None:
    """Delete what killed downloads left unfinished: the client never goes on with it. What one writes now is locked."""
    for part in blobs.glob("*.incomplete"):
        locks.mkdir(parents=True, exist_ok=True)
        with suppress(OSError), (locks / f"{part.name.partition('.')[0]}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
