"""Drives batches from creation to their end, also those that an earlier process left unfinished."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from service.batch import deadline
from service.batch.commit_log import INTERVAL_S, CommitLog, nothing
from service.batch.failed_starts import FailedStarts
from service.batch.lines import MAX_LINES, Line, count_lines, read_lines
from service.batch.store import QUOTA, Batch, BatchError, ClientStore, End, Store, StoredFile, size_of
from service.batch.worker import Progress, Send, drive, ignore_progress
from service.errors import one_line
from service.gateway.threads import in_thread
from service.in_engine.vllm_service.http_contract import MIB

AT_ONCE = 4  # batches of all clients, of each client one
_WAITS_S = 30.0  # after which a batch that waits counts no more for AT_ONCE
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 300.0  # of a client's batches after a failure
_SCAN_S = 60.0  # after which all batches are read without a sign of change
_LOOK_S = 2.0  # how often batches of other gateways on the same directory are looked for
_SWEEP_S = 3600.0
_RATE_S = 10.0  # a rate that was measured for less is not kept
_ENDS: dict[str, End] = {"done": "completed", "stopped": "cancelled", "expired": "expired"}
_FULL = (
    f"The files of this key have more than {QUOTA // 1024**3} GiB, which is the limit. Delete some, and send what is "
    "left again."
)
_GIVEN_UP = ("batch_failed", "The batch was given up before the request was answered.")
_log = logging.getLogger(__name__)


@dataclass
class _Driven:
    """A batch that is being driven.

    Attributes:
        directory: Its client's.
        is_over: It is cancelled or expired: nothing of it is sent any more.
        waits_since: Since when nothing of it could be sent; None: it can.
    """

    directory: Path
    is_over: bool
    waits_since: float | None = None

    @property
    def has_place(self) -> bool:
        """Whether it is one of `AT_ONCE`: one that has waited for long lets others begin."""
        return not self.is_over and (self.waits_since is None or time.monotonic() - self.waits_since < _WAITS_S)


class BatchRunner:
    """Drives the batches of a store, the oldest of each client first.

    Args:
        store: Has them.
        sender: Returns what sends the lines of a client.
        interval_s: Between two commits.
        commit: Makes what was written outlive the machine. Blocks.
    """

    def __init__(
        self,
        store: Store,
        sender: Callable[[ClientStore], Send],
        *,
        interval_s: float = INTERVAL_S,
        commit: Callable[[], None] = nothing,
    ) -> None:
        self._store, self._sender, self._interval_s, self._commit = store, sender, interval_s, commit
        self._running: dict[str, _Driven] = {}  # by the batch's id
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed_starts = FailedStarts()
        self._failures: dict[Path, int] = {}  # of a client's batches, one after the other
        self._resting: set[Path] = set()  # clients whose batches wait after a failure
        self._changed = asyncio.Event()

    def wake(self) -> None:
        """Look for batches: one was created or cancelled."""
        self._changed.set()

    async def run(self) -> None:
        """Drive what there is and what comes, until it is cancelled: the next process goes on."""
        swept_at = float("-inf")
        try:
            while True:
                self._changed.clear()
                changes = await in_thread(self._store.changes)
                if (now := time.monotonic()) - swept_at > _SWEEP_S:
                    swept_at = now
                    await in_thread(self._sweep)
                unfinished = await in_thread(self._unfinished)
                for store, batch in unfinished:
                    if self._may_start(store, batch):
                        self._start(store, batch)
                await self._change(changes, unfinished)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _change(self, changes: int, unfinished: list[tuple[ClientStore, Batch]]) -> None:
        """Wait until another batch may have to be started: here, by another gateway, or at the end of its window."""
        now = time.time()
        ends = [batch.expires_at - now for _, batch in unfinished if batch.id not in self._running]
        until = time.monotonic() + min([_SCAN_S, *(end for end in ends if end > 0)])
        while (left := until - time.monotonic()) > 0 and not self._changed.is_set():
            with suppress(TimeoutError):  # wait_for of Python 3.11 hides a cancellation that comes with the sign
                async with asyncio.timeout(min(left, _LOOK_S)):
                    await self._changed.wait()
            if await in_thread(self._store.changes) != changes:
                return

    def _unfinished(self) -> list[tuple[ClientStore, Batch]]:
        """Return the unfinished batches of all clients, the oldest first."""
        found = [(store, batch) for store in self._store.clients() for batch in store.batches() if not batch.is_final]
        return sorted((one for one in found if one[1].id not in one[0].unpublished), key=lambda one: one[1].id)

    def _may_start(self, store: ClientStore, batch: Batch) -> bool:
        running = self._running.values()
        if batch.id in self._running or store.directory in self._resting:
            return False
        if _is_over(batch):
            return sum(one.is_over for one in running) < AT_ONCE
        is_busy = any(one.directory == store.directory and not one.is_over for one in running)
        return not is_busy and sum(one.has_place for one in running) < AT_ONCE

    def _start(self, store: ClientStore, batch: Batch) -> None:
        driven = self._running[batch.id] = _Driven(store.directory, _is_over(batch))
        work = run_batch(
            self._store,
            store,
            batch.id,
            self._sender(store),
            self._failed_starts,
            interval_s=self._interval_s,
            commit=self._commit,
            on_progress=partial(self._on_progress, driven),
        )
        task = asyncio.create_task(work, name=f"batch {batch.id}")
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, batch.id))

    def _on_progress(self, driven: _Driven, progress: Progress) -> None:
        if progress.waiting is None:
            driven.waits_since = None
        elif driven.waits_since is None:
            driven.waits_since = time.monotonic()
            asyncio.get_running_loop().call_later(_WAITS_S, self.wake)

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        directory = self._running.pop(name).directory
        if not task.cancelled():
            if error := task.exception():
                self._rest(directory, name, error)
            else:
                self._failures.pop(directory, None)
        self._changed.set()

    def _rest(self, directory: Path, name: str, error: BaseException) -> None:
        """Leave the batches of a client alone for a while, the longer the more often they failed."""
        failures = self._failures[directory] = self._failures.get(directory, 0) + 1
        pause_s = min(_LONGEST_PAUSE_S, _PAUSE_S * 2 ** min(failures - 1, 20))
        if failures == 1 or not isinstance(error, OSError):
            _log.error("Batch %s goes on in %.0f s: %s", name, pause_s, one_line(error), exc_info=error)
        else:
            _log.warning("Batch %s goes on in %.0f s: %s", name, pause_s, one_line(error))
        self._resting.add(directory)

        def go_on() -> None:
            self._resting.discard(directory)
            self._changed.set()

        asyncio.get_running_loop().call_later(pause_s, go_on)

    def _sweep(self) -> None:
        for store in self._store.clients():
            try:
                store.remove_expired(time.time())
            except OSError as error:
                _log.warning("'%s' was not swept: %s", store.directory, one_line(error))


def _is_over(batch: Batch) -> bool:
    return batch.status == "cancelling" or batch.expires_at <= time.time()


async def run_batch(
    everything: Store,
    store: ClientStore,
    name: str,
    send: Send,
    failed_starts: FailedStarts,
    *,
    interval_s: float = INTERVAL_S,
    commit: Callable[[], None] = nothing,
    on_progress: Callable[[Progress], None] = ignore_progress,
) -> None:
    """Drive a batch to its end, from wherever an earlier process left it.

    Args:
        everything: Keeps the rate that was measured.
        store: Its client's.
        name: Its id.
        send: Sends a line.
        failed_starts: Of all batches; those that the batch's record has from an earlier process are added.
        interval_s: Between two commits.
        commit: Makes what was written outlive the machine. Blocks.
        on_progress: Called after each commit.

    Raises:
        OSError: Nothing can be written or read now: the batch is as it was, and may go on later; one whose lines all
            have a record does, also after its window.
    """
    batch = await in_thread(lambda: store.batch(name))
    if batch is None or batch.is_final:
        return
    driven = _Batch(everything, store, batch, interval_s=interval_s, commit=commit, on_progress=on_progress)
    try:
        await driven.run(send, failed_starts)
    except Exception as error:
        if isinstance(error, OSError) and (batch.end or time.time() < batch.expires_at):
            raise
        _log.exception("Batch %s failed.", name)
        await driven.give_up(error)
    await in_thread(commit)


class _Batch:
    def __init__(
        self,
        everything: Store,
        store: ClientStore,
        batch: Batch,
        *,
        interval_s: float,
        commit: Callable[[], None],
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._everything, self._store, self._batch = everything, store, batch
        self._interval_s, self._commit, self._tell = interval_s, commit, on_progress
        self._stop, self._is_full, self._saving = asyncio.Event(), False, threading.Lock()

    async def run(self, send: Send, failed_starts: FailedStarts) -> None:
        batch, counts = self._batch, self._batch.request_counts
        if batch.status == "finalizing" and batch.end:
            await self._finish(batch.end)
            return
        if not counts.total:
            batch.errors += await in_thread(self._validate)
            if not counts.total:
                batch.status, batch.failed_at = "failed", int(time.time())
                await self._save()
                return
        batch.status, batch.in_progress_at = "in_progress", batch.in_progress_at or int(time.time())
        batch.failed_starts = failed_starts.join(batch.failed_starts)
        await self._look_and_save()
        log = await in_thread(self._open_log)
        try:
            with await in_thread(lambda: self._input.open("rb")) as file:
                progress = await drive(
                    read_lines(file, batch.endpoint),
                    send,
                    log,
                    failed_starts=failed_starts,
                    on_progress=self._on_progress,
                    stop=self._stop,
                    deadline_s=batch.expires_at - time.time(),
                )
            if progress.end != "done":
                await in_thread(partial(self._record_rest, log, *self._why_left(progress.end)))
            await log.commit()
            counts.completed, counts.failed = log.completed, log.failed
        finally:
            await in_thread(log.close)
        await self._keep_rate(progress)
        is_cut = self._is_full and progress.end == "stopped" and not batch.cancelling_at
        await self._finish("failed" if is_cut else _ENDS[progress.end or "done"])

    async def give_up(self, error: Exception) -> None:
        """End the batch as failed; the answers that it has are kept, and the other lines get an error.

        Raises:
            OSError: That cannot be written either.
        """
        batch, counts = self._batch, self._batch.request_counts
        message = f"The batch was given up: {one_line(error)}. What was answered is in its files."
        batch.errors = [BatchError(code=_GIVEN_UP[0], message=message)]
        if counts.total:
            try:
                with closing(await in_thread(self._open_log)) as log:
                    await in_thread(partial(self._record_rest, log, *_GIVEN_UP))
                    await log.commit()
            except Exception:  # noqa: BLE001 - what the batch failed of may be in the way here too
                _log.exception("Not every line of batch %s has a record.", batch.id)
        counts.completed = await in_thread(lambda: _lines_of(self._store.content(batch.output_id)))
        counts.failed = await in_thread(lambda: _lines_of(self._store.content(batch.error_id)))
        await self._finish("failed")

    @property
    def _input(self) -> Path:
        return self._store.content(self._batch.input_file_id)

    async def _save(self) -> None:
        def save() -> None:
            with self._saving:  # a save that was cancelled may still run: the last one to write has the newest state
                self._store.save_batch(self._batch)

        await in_thread(save)

    def _open_log(self) -> CommitLog:
        batch, store = self._batch, self._store
        for name in (batch.output_id, batch.error_id):
            store.make_directory("files", name)
        output, errors = store.content(batch.output_id), store.content(batch.error_id)
        prefix = f"{batch.id.removeprefix('batch_')}_"
        return CommitLog(output, errors, prefix=prefix, interval_s=self._interval_s, commit=self._commit)

    def _validate(self) -> list[BatchError]:
        """Count the lines; return why there can be no batch of them."""
        name = self._batch.input_file_id
        try:
            with self._input.open("rb") as file:
                count = count_lines(file, MAX_LINES)
        except FileNotFoundError:
            message = f"The input file '{name}' is there no more."
            return [BatchError(code="file_not_found", message=message, param="input_file_id")]
        known, size = self._store.file(name), size_of(self._input)
        if known and known.bytes != size:
            message = (
                f"The input file '{name}' has {size} bytes of {known.bytes}: a part of it was lost. Upload it again."
            )
            return [BatchError(code="file_damaged", message=message, param="input_file_id")]
        if not count:
            return [BatchError(code="empty_file", message="The input file has no line.", param="input_file_id")]
        if count > MAX_LINES:
            most = f"{MAX_LINES} lines, or {2 * MAX_LINES} with empty ones"
            message = f"The input file has more than {most}, which is the limit. Make several batches of it."
            return [BatchError(code="too_many_lines", message=message, param="input_file_id")]
        self._batch.request_counts.total = count
        return []

    async def _on_progress(self, progress: Progress) -> None:
        batch, now = self._batch, time.time()
        counts = batch.request_counts
        counts.completed, counts.failed = progress.completed, progress.failed
        if not self._is_full and progress.lines_per_s and progress.seconds >= _RATE_S:
            left = counts.total - counts.completed - counts.failed
            batch.errors = deadline.warnings(batch, left, progress.lines_per_s, now)
        await (self._save() if progress.end else self._look_and_save())
        self._tell(progress)

    async def _look_and_save(self) -> None:
        """Save the batch, and stop it if it was asked to be cancelled or its client has no room left."""
        batch = self._batch
        if not self._is_full and await in_thread(lambda: self._store.is_full):
            self._is_full = True
            batch.errors = [BatchError(code="quota_exceeded", message=_FULL)]
            self._stop.set()
        if asked_at := await in_thread(lambda: self._store.cancel_asked_at(batch)):
            batch.status, batch.cancelling_at = "cancelling", asked_at
            self._stop.set()
        await self._save()

    def _why_left(self, end: str | None) -> tuple[str, str]:
        """Return code and message of the lines that are left at such an end."""
        if end == "expired":
            return "batch_expired", "The request was not answered before the completion window ended."
        if self._is_full:
            return "quota_exceeded", _FULL
        return "batch_cancelled", "The batch was cancelled before the request was answered."

    def _record_rest(self, log: CommitLog, code: str, why: str) -> None:
        """Record of every line without an answer why it has none."""
        with self._input.open("rb") as file:
            for line in read_lines(file, self._batch.endpoint):
                if line.number not in log.done:
                    one = (code, why) if isinstance(line, Line) else (line.code, line.message)
                    log.add_error(line, *one)

    async def _keep_rate(self, progress: Progress) -> None:
        batch = self._batch
        if progress.seconds >= _RATE_S and (done := batch.request_counts.completed):
            rate = done / max(1, time.time() - (batch.in_progress_at or time.time()))
            await in_thread(lambda: self._everything.save_rate(deadline.rate_name(batch, self._input), rate))

    async def _finish(self, end: End) -> None:
        """Publish what was answered; a process that finds the batch like this goes on here."""
        batch, now = self._batch, int(time.time())
        batch.status, batch.end, batch.finalizing_at = "finalizing", end, batch.finalizing_at or now
        await self._save()
        await in_thread(self._publish_files)
        if end == "completed":
            batch.errors = []
        batch.status = end
        setattr(batch, f"{end}_at", now)
        await self._save()

    def _publish_files(self) -> None:
        """Make the output and the error file files of the client; an empty one is removed."""
        batch = self._batch
        batch.output_file_id = self._publish_file(batch.output_id, "output")
        batch.error_file_id = self._publish_file(batch.error_id, "error")
        self._store.publish()  # what the last status promises is there for good

    def _publish_file(self, name: str, kind: str) -> str | None:
        size, now = size_of(self._store.content(name)), int(time.time())
        if not size:  # or it was removed by a process that ended here
            self._store.delete(name)
            return None
        self._store.save_file(
            StoredFile(
                id=name,
                bytes=size,
                created_at=now,
                expires_at=now + self._batch.output_kept_s,
                filename=f"{self._batch.id}_{kind}.jsonl",
                purpose="batch_output",
            )
        )
        return name


def _lines_of(file: Path) -> int:
    try:
        with file.open("rb") as opened:
            return sum(piece.count(b"\n") for piece in iter(partial(opened.read, MIB), b""))
    except FileNotFoundError:
        return 0
