"""The worker of a batch: every line has one record, whatever its requests and its own process meet."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from service.batch import worker
from service.batch.commit_log import CommitLog
from service.batch.concurrency import ConcurrencySearch
from service.batch.lines import BadLine, Line
from service.batch.worker import Answer, Progress, drive

GOOD = Answer(200, b'{"ok":true}', tokens_in=2, tokens_out=3, dollars=0.5)


def lines(count: int) -> list[Line]:
    """Return so many lines."""
    return [Line(number, f"id {number}", "/v1/completions", b"{}") for number in range(1, count + 1)]


def run(
    directory: Path, work: Iterable[Line | BadLine], send: Callable[[Line], Awaitable[Answer]], **options: Any
) -> Progress:
    """Drive lines with short pauses, and return how it ended."""
    log = CommitLog(directory / "out", directory / "err", interval_s=0.05)
    try:
        return asyncio.run(drive(work, send, log, retry_s=0.001, **options))
    finally:
        log.close()


def records(directory: Path) -> tuple[list[Any], list[Any]]:
    """Return the records of output and error file."""
    out, err = ([json.loads(line) for line in (directory / name).read_text().splitlines()] for name in ("out", "err"))
    return out, err


def ids(found: list[Any]) -> list[str]:
    """Return the custom ids of records, sorted."""
    return sorted((one["custom_id"] for one in found), key=lambda name: int(name.split()[1]))


def test_every_line_has_one_record(tmp_path: Path) -> None:
    """Answers in the output, bad lines and refused ones in the error file, and counts of all."""

    async def send(line: Line) -> Answer:
        await asyncio.sleep(0)
        return Answer(400, b'{"error":{}}', tokens_in=0) if line.number == 5 else GOOD

    work = [*lines(300), BadLine(301, None, "invalid_json", "Line 301: no.")]
    progress = run(tmp_path, work, send)

    out, err = records(tmp_path)
    assert ids(out) == [f"id {number}" for number in range(1, 301) if number != 5]
    assert {one["custom_id"] for one in err} == {None, "id 5"}
    assert (progress.completed, progress.failed, progress.in_flight, progress.end) == (299, 2, 0, "done")
    assert (progress.tokens_in, progress.tokens_out, progress.dollars) == (598, 897, 149.5)


def test_bytes_in_flight_are_bounded_and_a_longer_line_is_sent_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interactive requests of the same key have room for theirs."""
    monkeypatch.setattr(worker, "_BYTES_AT_ONCE", 100)
    running, most = 0, 0

    async def send(line: Line) -> Answer:
        nonlocal running, most
        running += len(line.body)
        most = max(most, running)
        assert running <= 100 or running == len(line.body)
        await asyncio.sleep(0.001)
        running -= len(line.body)
        return GOOD

    sizes = {number: 500 if number == 7 else 30 for number in range(1, 30)}
    work = [Line(number, f"id {number}", "/v1/completions", b"x" * size) for number, size in sizes.items()]
    assert run(tmp_path, work, send).completed == 29
    assert most == 500


def test_number_in_flight_is_never_above_the_limit_of_the_search(tmp_path: Path) -> None:
    """And reaches it."""
    running, most = 0, 0

    async def send(_: Line) -> Answer:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return GOOD

    run(tmp_path, lines(100), send, search=ConcurrencySearch(first=7, most=7))

    assert most == 7


@pytest.mark.parametrize(
    ("answer", "tries"),
    [
        (Answer(429, b"{}", retry_after_s=0.001), 20),
        (Answer(503, b"{}", retry_after_s=0.001), 20),
        (ConnectionRefusedError("nobody listens"), 20),
        (Answer(500, b"{}"), 4),
        (Answer(502, b"{}"), 4),
        (Answer(504, b"{}"), 4),
        (ConnectionResetError("lost"), 4),
    ],
)
def test_line_that_may_succeed_later_is_sent_again(tmp_path: Path, answer: Answer | OSError, tries: int) -> None:
    """Where the service asks to wait without a limit, else a few times."""
    sent: Counter[int] = Counter()

    async def send(line: Line) -> Answer:
        sent[line.number] += 1
        if sent[line.number] <= tries:
            if isinstance(answer, OSError):
                raise answer
            return answer
        return GOOD

    progress = run(tmp_path, lines(3), send)

    assert (progress.completed, progress.failed) == (3, 0)
    assert len(records(tmp_path)[0]) == 3


@pytest.mark.parametrize("answer", [Answer(500, b'{"error":"e"}'), OSError("lost")])
def test_line_that_never_succeeds_ends_in_the_error_file(tmp_path: Path, answer: Answer | OSError) -> None:
    """After five tries, with what was answered last."""
    sent: Counter[int] = Counter()

    async def send(line: Line) -> Answer:
        sent[line.number] += 1
        if isinstance(answer, OSError):
            raise answer
        return answer

    progress = run(tmp_path, lines(2), send)

    assert set(sent.values()) == {5}
    assert progress.failed == 2
    out, err = records(tmp_path)
    assert not out
    assert err[0]["error" if isinstance(answer, OSError) else "response"]


def test_line_that_kills_its_engine_fails_alone(tmp_path: Path) -> None:
    """Those that were lost with it twice are sent one at a time, and answered."""
    running: set[int] = set()
    killed = asyncio.Event()

    async def send(line: Line) -> Answer:
        nonlocal killed
        running.add(line.number)
        mine = killed
        try:
            if line.number == 9:
                await asyncio.sleep(0.002)
                killed.set()
                killed = asyncio.Event()
                raise ConnectionResetError("the engine is gone")
            await asyncio.wait([asyncio.ensure_future(mine.wait())], timeout=0.003)
            if mine.is_set():
                raise ConnectionResetError("the engine is gone")
            return GOOD
        finally:
            running.discard(line.number)

    progress = run(tmp_path, lines(40), send, search=ConcurrencySearch(first=16))

    out, err = records(tmp_path)
    assert ids(err) == ["id 9"]
    assert len(out) == 39
    assert (progress.completed, progress.failed) == (39, 1)


def test_worker_that_is_killed_at_any_moment_goes_on_and_repeats_only_what_was_in_flight(tmp_path: Path) -> None:
    """No line has two records, and none is lost."""
    chance = random.Random(3)  # noqa: S311 - no secret
    sent: Counter[int] = Counter()

    async def send(line: Line) -> Answer:
        sent[line.number] += 1
        await asyncio.sleep(chance.random() * 0.004)
        return GOOD

    async def killed(seconds: float) -> bool:
        log = CommitLog(tmp_path / "out", tmp_path / "err", interval_s=10)
        work = asyncio.ensure_future(drive(lines(300), send, log, search=ConcurrencySearch(first=8, most=8)))
        done, _ = await asyncio.wait([work], timeout=seconds)
        work.cancel()
        await asyncio.wait([work])
        log.close()
        return not done

    kills = 0
    while asyncio.run(killed(0.005 + chance.random() * 0.04)):
        kills += 1

    out, err = records(tmp_path)
    assert kills >= 3
    assert ids(out) == [f"id {number}" for number in range(1, 301)]
    assert not err
    assert sum(sent.values()) - 300 <= 8 * kills


def test_stop_ends_with_what_is_in_flight(tmp_path: Path) -> None:
    """Nothing more is sent, and what was sent is recorded."""

    async def work() -> Progress:
        stop = asyncio.Event()

        async def send(line: Line) -> Answer:
            if line.number == 10:
                stop.set()
            await asyncio.sleep(0.002)
            return GOOD

        log = CommitLog(tmp_path / "out", tmp_path / "err")
        return await drive(lines(100), send, log, stop=stop)

    progress = asyncio.run(work())

    assert progress.end == "stopped"
    assert 10 <= progress.completed < 20
    assert len(records(tmp_path)[0]) == progress.completed


def test_deadline_cancels_what_is_in_flight(tmp_path: Path) -> None:
    """A line that waits for a pool would outlast it."""
    cancelled: list[int] = []

    async def send(line: Line) -> Answer:
        try:
            await asyncio.sleep(0 if line.number < 3 else 60)
        except asyncio.CancelledError:
            cancelled.append(line.number)
            raise
        return GOOD

    progress = run(tmp_path, lines(20), send, deadline_s=0.1)

    assert progress.end == "expired"
    assert progress.completed == 2
    assert cancelled


def test_log_that_cannot_be_written_ends_the_run_with_its_error(tmp_path: Path) -> None:
    """A full disk is no error of a line."""

    def full() -> None:
        raise OSError(28, "No space left on device")

    async def work() -> None:
        async def send(_: Line) -> Answer:
            await asyncio.sleep(0.001)
            return GOOD

        log = CommitLog(tmp_path / "out", tmp_path / "err", interval_s=0.01, commit=full)
        await drive(lines(10_000), send, log)

    with pytest.raises(OSError, match="No space"):
        asyncio.run(work())


def test_progress_tells_why_everything_waits(tmp_path: Path) -> None:
    """A person who looks on sees the reason."""
    seen: list[Progress] = []
    tries: Counter[int] = Counter()

    async def send(line: Line) -> Answer:
        tries[line.number] += 1
        return GOOD if tries[line.number] > 1 else Answer(429, b"slow down", retry_after_s=0.2)

    run(tmp_path, lines(2), send, on_progress=seen.append)

    assert "slow down" in {one.waiting for one in seen}
    assert seen[-1].waiting is None
    assert seen[-1].end == "done"
