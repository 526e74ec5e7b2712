"""Tests of what drives batches: what it does on a full disk, after a restart, and with batches that wait."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import stat
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path

import pytest

from service.batch import commit_log, runner
from service.batch import store as batch_store
from service.batch.lines import Line
from service.batch.runner import BatchRunner
from service.batch.store import Batch, ClientStore, Counts, Store, StoredFile
from service.batch.worker import Answer

CHAT = "/v1/chat/completions"
OK = Answer(200, b'{"id":"x"}', tokens_out=1)


def batch_of(store: ClientStore, number: int = 0, lines: int = 3, window_s: int = 3600, **fields: object) -> Batch:
    """Create a batch as the routes do."""
    content = b"".join(
        json.dumps({"custom_id": str(one), "method": "POST", "url": CHAT, "body": {"model": "tiny"}}).encode() + b"\n"
        for one in range(lines)
    )
    now, upload = int(time.time()), store.upload_directory()
    with store.open_upload(upload) as opened:
        opened.write(content)
    file = StoredFile(
        id=f"file-in{number}",
        bytes=len(content),
        created_at=now,
        expires_at=now + 9999,
        filename="in.jsonl",
        purpose="batch",
        lines=lines,
    )
    store.add(file, upload)
    batch = Batch(
        id=f"batch_{number}",
        endpoint=CHAT,
        input_file_id=file.id,
        completion_window="24h",
        created_at=now,
        expires_at=now + window_s,
        output_id=f"file-out{number}",
        error_id=f"file-err{number}",
        **fields,  # type: ignore[arg-type]
    )
    store.save_batch(batch)
    return batch


def drive(
    store: Store,
    send: Callable[[Line], Awaitable[Answer]],
    until: Callable[[], bool],
    timeout_s: float = 10.0,
) -> None:
    """Drive the batches of a store until something holds."""

    async def work() -> None:
        driver = BatchRunner(store, lambda _: send, interval_s=0.02)
        task = asyncio.create_task(driver.run())
        try:
            async with asyncio.timeout(timeout_s):
                while not until():
                    assert not task.done()
                    await asyncio.sleep(0.01)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(work())


def status(store: ClientStore, batch: Batch) -> str:
    """Return a batch's status."""
    found = store.batch(batch.id)
    return found.status if found else "none"


async def answers(_: Line) -> Answer:
    """Answer at once."""
    return OK


def test_batch_on_a_full_disk_is_tried_again_with_growing_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No record can be written, not even that it failed: lines are not sent again and again."""
    store = Store(tmp_path)
    batch_of(store.of("alice"))
    starts: list[float] = []

    def full(_self: object, _batch: Batch) -> None:
        starts.append(time.monotonic())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ClientStore, "save_batch", full)
    monkeypatch.setattr(runner, "_PAUSE_S", 0.1)
    drive(store, answers, lambda: len(starts) == 4)
    pauses = [after - before for before, after in pairwise(starts)]
    assert pauses[0] >= 0.1
    assert pauses[1] >= 0.2
    assert pauses[2] >= 0.4


def test_batch_that_met_a_full_disk_goes_on_and_keeps_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays in progress; a line that has an answer is not sent again."""
    store = Store(tmp_path)
    alice = store.of("alice")
    batch = batch_of(alice, lines=20)
    failures = [OSError(errno.ENOSPC, "No space left on device")]
    sent: list[int] = []
    sync = commit_log._RecordFile.sync

    def full_once(self: commit_log._RecordFile) -> None:
        if failures and len(sent) > 10:
            assert status(alice, batch) == "in_progress"
            raise failures.pop()
        sync(self)

    async def send(line: Line) -> Answer:
        await asyncio.sleep(0.01)
        sent.append(line.number)
        return OK

    monkeypatch.setattr(commit_log._RecordFile, "sync", full_once)
    monkeypatch.setattr(runner, "_PAUSE_S", 0.05)
    drive(store, send, lambda: status(alice, batch) == "completed")
    assert not failures
    assert sorted(sent) == [*range(1, 21)]
    found = alice.batch(batch.id)
    assert found
    assert found.request_counts == Counts(20, 20, 0)


def test_batch_that_is_given_up_keeps_its_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its output is a file of the client, and every other line says that it was given up."""
    store = Store(tmp_path)
    alice = store.of("alice")
    batch = batch_of(alice, lines=20)

    def broken(self: runner._Batch, progress: object) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(runner._Batch, "_on_progress", broken)

    async def send(line: Line) -> Answer:
        return OK if line.number <= 2 else await asyncio.sleep(60, OK)

    drive(store, send, lambda: status(alice, batch) == "failed")
    found = alice.batch(batch.id)
    assert found
    assert (found.output_file_id, found.request_counts) == (batch.output_id, Counts(20, 2, 18))
    assert [error.code for error in found.errors] == ["batch_failed"]
    assert alice.file(batch.output_id)
    errors = [json.loads(record)["error"] for record in alice.content(batch.error_id).read_bytes().splitlines()]
    assert {error["code"] for error in errors} == {"batch_failed"}
    assert sorted(error["line"] for error in errors) == [*range(3, 21)]


def test_batch_is_given_up_after_its_window_also_where_its_input_is_gone(tmp_path: Path) -> None:
    """Its lines are not known then."""
    store = Store(tmp_path)
    alice = store.of("alice")
    batch = batch_of(alice, window_s=-1, status="in_progress", request_counts=Counts(3, 0, 0))
    alice.content(batch.input_file_id).unlink()
    drive(store, answers, lambda: status(alice, batch) == "failed")


@pytest.mark.parametrize(("window_s", "end"), [(3600, "completed"), (-1, "expired")])
def test_batch_whose_end_cannot_be_published_ends_later_and_as_it_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_s: int, end: str
) -> None:
    """As where a volume cannot be committed: no line is sent again, also after the window."""
    failing = False
    failures: list[str] = []
    sent: list[int] = []

    def publish() -> None:
        if failing and len(failures) < 5:
            failures.append(status(alice, batch))
            raise OSError("The volume was not committed")

    async def send(line: Line) -> Answer:
        sent.append(line.number)
        return OK

    store = Store(tmp_path, publish)
    alice = store.of("alice")
    batch = batch_of(alice, window_s=window_s)
    failing = True
    monkeypatch.setattr(runner, "_PAUSE_S", 0.01)
    drive(store, send, lambda: status(alice, batch) in {"completed", "expired", "failed"})
    found = alice.batch(batch.id)
    assert found
    assert (found.status, found.errors) == (end, [])
    assert failures == ["finalizing"] * 5
    assert sorted(sent) == ([1, 2, 3] if end == "completed" else [])


def test_batch_is_not_driven_before_it_is_published(tmp_path: Path) -> None:
    """One that cannot be published is removed, and no line of it may have been sent."""
    seen: list[list[str]] = []

    def unfinished() -> list[str]:
        return [found.id for _, found in BatchRunner(store, lambda _: answers)._unfinished()]

    store = Store(tmp_path, lambda: seen.append(unfinished()))
    alice = store.of("alice")
    batch = batch_of(alice)
    batch.id = "batch_new"
    alice.add_batch(batch)
    assert seen[-1] == ["batch_0"]
    assert unfinished() == ["batch_0", "batch_new"]


@pytest.mark.parametrize("turns", range(4))
def test_driver_that_is_cancelled_as_a_batch_ends_has_ended(tmp_path: Path, turns: int) -> None:
    """The sign of the batch's end does not hide the cancellation, for which the gateway's shutdown waits."""

    async def work() -> None:
        driver = BatchRunner(Store(tmp_path), lambda _: answers)
        task = asyncio.create_task(driver.run())
        await asyncio.sleep(0.2)
        driver.wake()
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=1)
        assert task.cancelled()

    asyncio.run(work())


def test_batch_that_was_finalizing_never_goes_back(tmp_path: Path) -> None:
    """The next process publishes its files, also where one was removed before, and sends nothing."""
    store = Store(tmp_path)
    alice = store.of("alice")
    batch = batch_of(alice, status="finalizing", end="cancelled", request_counts=Counts(3, 1, 2))
    alice.make_directory("files", batch.output_id)
    alice.content(batch.output_id).write_bytes(b"{}\n")

    async def never(_: Line) -> Answer:
        raise AssertionError

    seen: set[str] = set()

    def is_over() -> bool:
        seen.add(status(alice, batch))
        return "cancelled" in seen

    drive(store, never, is_over)
    assert seen <= {"finalizing", "cancelled"}
    found = alice.batch(batch.id)
    assert found
    assert (found.output_file_id, found.error_file_id) == (batch.output_id, None)


@pytest.mark.parametrize("end", ["cancelled", "expired"])
def test_batch_that_waits_for_its_turn_ends_when_it_is_cancelled_or_expired(tmp_path: Path, end: str) -> None:
    """Another batch of its key runs meanwhile; the cancellation may come through another gateway."""
    store = Store(tmp_path)
    alice = store.of("alice")
    first, second = batch_of(alice, 1), batch_of(alice, 2, window_s=1 if end == "expired" else 3600)

    async def send(line: Line) -> Answer:
        if end == "cancelled":
            store.of("alice").ask_to_cancel(second)
        return await asyncio.sleep(60, OK)

    drive(store, send, lambda: status(alice, second) == end)
    assert status(alice, first) == "in_progress"


def test_batches_that_wait_let_those_of_other_keys_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of them, whose service asks them to wait."""
    store = Store(tmp_path)
    for number in range(runner.AT_ONCE):
        batch_of(store.of(f"slow{number}"), number, lines=1)
    fast = store.of("alice")
    batch = batch_of(fast, 9)

    async def waits(_: Line) -> Answer:
        return Answer(429, b"{}", retry_after_s=60)

    async def work() -> None:
        driver = BatchRunner(store, lambda one: answers if one.owner == "alice" else waits, interval_s=0.02)
        task = asyncio.create_task(driver.run())
        async with asyncio.timeout(10):
            while status(fast, batch) != "completed":  # noqa: ASYNC110 - files
                await asyncio.sleep(0.01)
        task.cancel()

    monkeypatch.setattr(runner, "_WAITS_S", 0.2)
    asyncio.run(work())


def test_batch_ends_with_a_named_error_once_its_key_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has an answer is kept, and every other line says why it has none."""
    store = Store(tmp_path)
    alice = store.of("alice")
    batch = batch_of(alice, lines=2000)
    monkeypatch.setattr(batch_store, "QUOTA", alice.used_bytes() + 2000)

    async def send(_: Line) -> Answer:
        return await asyncio.sleep(0.005, OK)

    drive(store, send, lambda: status(alice, batch) == "failed")
    found = alice.batch(batch.id)
    assert found
    assert [error.code for error in found.errors] == ["quota_exceeded"]
    assert 0 < found.request_counts.completed < 2000
    assert found.request_counts.completed + found.request_counts.failed == 2000
    assert b"quota_exceeded" in alice.content(batch.error_id).read_bytes()


def test_input_that_lost_a_part_fails_its_batch(tmp_path: Path) -> None:
    """As after a loss of power."""
    store = Store(tmp_path)
    alice = store.of("alice")
    batch = batch_of(alice)
    alice.content(batch.input_file_id).write_bytes(b"{}\n")
    drive(store, answers, lambda: status(alice, batch) == "failed")
    found = alice.batch(batch.id)
    assert found
    assert [error.code for error in found.errors] == ["file_damaged"]


def test_file_whose_record_cannot_be_read_is_not_swept(tmp_path: Path) -> None:
    """Only an expired one is."""
    alice = Store(tmp_path).of("alice")
    batch_of(alice, 1)
    record = alice.content("file-in1").with_name("record.json")
    record.write_bytes(b"{")
    (tmp_path / "key-alice" / "batches" / "batch_1" / "record.json").unlink()
    alice.remove_expired(time.time())
    assert alice.content("file-in1").exists()


def test_files_are_for_their_user_alone_from_the_first_byte_on(tmp_path: Path) -> None:
    """Directories and files, also where the root was there for all."""
    root = tmp_path / "batches"
    root.mkdir(mode=0o755)
    alice = Store(root).of("alice")
    batch_of(alice)
    found = [root, *root.rglob("*")]
    assert len(found) == 9
    assert not [path for path in found if path.stat().st_mode & 0o077]


def test_directory_that_cannot_be_synced_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some network file systems; an error of a file's own sync is raised."""
    fsync = os.fsync

    def no_directories(opened: int) -> None:
        if stat.S_ISDIR(os.fstat(opened).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(opened)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    alice = Store(tmp_path).of("alice")
    monkeypatch.setattr(os, "fsync", no_directories)
    batch = batch_of(alice)
    assert alice.file(batch.input_file_id)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        alice.save_batch(batch)
