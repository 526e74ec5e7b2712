"""Drives the lines of a batch: sends them, as many at a time as saturate the pool, and records what came of each.

No error of a line ends it. It waits where the service asks it to, and repeats what may succeed a little later; for a
model that does not start it waits for a bounded time.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

from service.batch.commit_log import CommitLog
from service.batch.concurrency import ConcurrencySearch
from service.batch.failed_starts import FailedStarts
from service.batch.lines import BadLine, Line, named_model
from service.gateway.threads import in_thread

TRIES = 5  # of a line that the service failed at
_LOSSES = 2  # of an engine under a line, after which it is sent alone
_RETRY_S, _LONGEST_RETRY_S = 0.5, 30.0
_AGAIN = {408, 500, 502, 503, 504}
_READ_LINES, _READ_BYTES = 64, 1 << 20  # lines that are read ahead
_BYTES_AT_ONCE = 32 << 20  # of the lines in flight, or one longer line: four batches have a quarter of a key's bodies
_RECENT_S = 30.0  # of which the rates are told

End = Literal["done", "stopped", "expired"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the service answered to a line.

    Attributes:
        status: HTTP's.
        body: Its JSON.
        request_id: Its id in the service's log.
        retry_after_s: When it may be sent again, where the service says so.
        code: Of the error, where it has one.
        tokens_in: Of the prompt.
        tokens_out: Of the answer.
        dollars: What it cost.
        model: The model that was asked, and where it runs; empty: one service does not tell it from others.
    """

    status: int
    body: bytes
    request_id: str = ""
    retry_after_s: float | None = None
    code: str | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    dollars: float = 0.0
    model: str = ""


# Sends a line. It raises ConnectionRefusedError where nothing was sent, and any other OSError where no answer came.
Send = Callable[[Line], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a batch is.

    Attributes:
        completed: Lines with an answer, those of earlier runs too.
        failed: Lines with an error, likewise.
        in_flight: Lines that are being answered.
        concurrency: Lines that may be.
        tokens_in: Of the prompts of this run.
        tokens_out: Of its answers.
        dollars: What it cost.
        seconds: How long it has taken.
        lines_per_s: Lately.
        tokens_per_s: Of answers, lately.
        waiting: Why all that is in flight waits; None: it does not.
        end: How it ended; None: it has not.
    """

    completed: int
    failed: int
    in_flight: int
    concurrency: int
    tokens_in: int
    tokens_out: int
    dollars: float
    seconds: float
    lines_per_s: float
    tokens_per_s: float
    waiting: str | None
    end: End | None


OnProgress = Callable[[Progress], Awaitable[None] | None]


def ignore_progress(_: Progress) -> None:
    """Do nothing."""


async def drive(
    lines: Iterable[Line | BadLine],
    send: Send,
    log: CommitLog,
    *,
    search: ConcurrencySearch | None = None,
    failed_starts: FailedStarts | None = None,
    on_progress: OnProgress = ignore_progress,
    stop: asyncio.Event | None = None,
    deadline_s: float | None = None,
    retry_s: float = _RETRY_S,
) -> Progress:
    """Send all lines that have no record yet, and record what comes of them.

    Cancelling it cancels what is in flight; what has a record keeps it.

    Args:
        lines: Read piece by piece, in a thread.
        send: Sends one.
        log: Gets the records.
        search: Says how many may be in flight.
        failed_starts: Of the models; default: none is known yet.
        on_progress: Called after each commit, and at the end.
        stop: Once it is set nothing more is sent, and it ends with what is in flight.
        deadline_s: Seconds after which it ends, and cancels what is in flight; None: never.
        retry_s: Before the first repetition of a line that failed; each further one waits twice as long.

    Raises:
        OSError: The log cannot be written.
    """
    stop = stop or asyncio.Event()
    run = _Run(
        lines,
        send,
        log,
        search or ConcurrencySearch(),
        failed_starts or FailedStarts(),
        on_progress=on_progress,
        stop=stop,
        retry_s=retry_s,
    )
    return await run.run(deadline_s)


class _Run:
    def __init__(
        self,
        lines: Iterable[Line | BadLine],
        send: Send,
        log: CommitLog,
        search: ConcurrencySearch,
        failed_starts: FailedStarts,
        *,
        on_progress: OnProgress,
        stop: asyncio.Event,
        retry_s: float,
    ) -> None:
        self._lines, self._send, self._log, self._search = iter(lines), send, log, search
        self._failed_starts = failed_starts
        self._given_up: dict[str, Answer] = {}  # name of a model -> what all its lines get: a request may wake it
        self._on_progress, self._stop, self._retry_s = on_progress, stop, retry_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._suspects: deque[tuple[Line, int]] = deque()  # they are sent alone; and how often each was sent
        self._is_alone = False
        self._bytes = 0  # of the lines in flight
        self._waits: dict[int, str] = {}  # number of a line -> why it waits
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None
        self._is_expired = False
        self._began = time.monotonic()
        self._samples: deque[tuple[float, int, int]] = deque()
        self._ends = self._tokens_in = self._tokens_out = 0
        self._dollars = 0.0

    async def run(self, deadline_s: float | None) -> Progress:
        loop = asyncio.get_running_loop()
        timer = None if deadline_s is None else loop.call_later(max(0.0, deadline_s), self._expire)
        beside = [asyncio.ensure_future(self._commit_at_intervals()), asyncio.ensure_future(self._watch_stop())]
        try:
            await self._dispatch()
            while (self._tasks or self._suspects) and not self._must_end:
                if not self._start_suspect():
                    await self._change()
            await self._empty()
        finally:
            if timer:
                timer.cancel()
            for task in (*beside, *self._tasks):
                task.cancel()
            await asyncio.gather(*beside, *self._tasks, return_exceptions=True)
            if not self._failure:
                await self._log.commit()
        if self._failure:
            raise self._failure
        progress = self._progress("expired" if self._is_expired else "stopped" if self._stop.is_set() else "done")
        await self._report(progress)
        return progress

    @property
    def _must_end(self) -> bool:
        return self._stop.is_set() or self._is_expired or self._failure is not None

    async def _dispatch(self) -> None:
        while not self._must_end and (piece := await in_thread(self._read)):
            for line in piece:
                if isinstance(line, BadLine):
                    self._log.add_error(line, line.code, line.message)
                    continue
                await self._room(len(line.body))
                if self._must_end:
                    return
                self._start(line)

    def _read(self) -> list[Line | BadLine]:
        """Read some lines that have no record; fewer where they are long."""
        piece, size = [], 0
        for line in self._lines:
            if line.number in self._log.done:
                continue
            piece.append(line)
            size += len(line.body) if isinstance(line, Line) else 0
            if len(piece) >= _READ_LINES or size >= _READ_BYTES:
                break
        return piece

    async def _room(self, size: int) -> None:
        """Wait until another line of this size may be sent; send those that must be alone."""
        while not self._must_end:
            if self._start_suspect():
                pass
            elif not self._tasks:
                self._is_alone = False
                return
            elif (
                not (self._is_alone or self._suspects)
                and len(self._tasks) < self._search.limit
                and self._bytes + size <= _BYTES_AT_ONCE
            ):
                return
            await self._change()

    async def _empty(self) -> None:
        """Wait for the end of all that is in flight."""
        while self._tasks and not (self._is_expired or self._failure):
            await self._change()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _start_suspect(self) -> bool:
        """Send a line alone, if one must be and nothing else is in flight."""
        if self._tasks or not self._suspects:
            return False
        self._is_alone = True
        self._start(*self._suspects.popleft())
        return True

    def _start(self, line: Line, tries: int = 0) -> None:
        task = asyncio.ensure_future(self._answer(line, tries, alone=self._is_alone))
        self._tasks.add(task)
        self._bytes += len(line.body)
        task.add_done_callback(partial(self._on_end, len(line.body)))

    def _on_end(self, size: int, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._bytes -= size
        if not task.cancelled() and (error := task.exception()):
            self._failure = self._failure or error
        self._changed.set()

    async def _answer(self, line: Line, tries: int, *, alone: bool) -> None:
        losses = 0
        while True:
            if self._given_up and (known := self._given_up.get(named_model(line.body))):
                self._record(line, known)
                return
            try:
                answer: Answer | OSError = await self._send(line)
            except ConnectionRefusedError as error:
                await self._pause(line, min(_LONGEST_RETRY_S, 10 * self._retry_s), str(error))
                continue
            except OSError as error:
                answer = error
            if isinstance(answer, Answer) and (self._gives_up(line, answer) or self._is_final(answer)):
                self._record(line, answer)
                return
            if isinstance(answer, Answer) and answer.retry_after_s is not None and answer.status in {429, 503}:
                await self._pause(line, answer.retry_after_s, answer.body[:300].decode(errors="replace"))
                continue
            tries += 1
            losses += isinstance(answer, OSError) or answer.status == 502
            if tries >= TRIES:
                self._record(line, answer)
                return
            if losses >= _LOSSES and not alone:
                self._suspects.append((line, tries))
                return
            await self._pause(line, min(_LONGEST_RETRY_S, self._retry_s * 2 ** (tries - 1)), _why(answer))

    def _gives_up(self, line: Line, answer: Answer) -> bool:
        """Tell whether the line's model has failed to start for so long that none of its lines waits or is sent."""
        if is_given_up := self._failed_starts.take(answer):
            self._given_up[named_model(line.body)] = answer
        return is_given_up

    @staticmethod
    def _is_final(answer: Answer) -> bool:
        return answer.status not in _AGAIN and answer.status != 429

    async def _pause(self, line: Line, seconds: float, why: str) -> None:
        """Wait before a line is sent again; once nothing more is to be sent the line ends without a record."""
        self._waits[line.number] = why
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), seconds)
                raise asyncio.CancelledError
        finally:
            del self._waits[line.number]
            self._search.restart()

    def _record(self, line: Line, answer: Answer | OSError) -> None:
        if isinstance(answer, OSError):
            self._log.add_error(line, "no_answer", f"Line {line.number}: {_why(answer)}")
        else:
            self._log.add_answer(line, answer.status, answer.request_id, answer.body)
            self._tokens_in += answer.tokens_in
            self._tokens_out += answer.tokens_out
            self._dollars += answer.dollars
            self._search.ended(answer.tokens_in + answer.tokens_out)
        self._ends += 1

    async def _commit_at_intervals(self) -> None:
        try:
            while True:
                await asyncio.sleep(self._log.interval_s)
                await self._log.commit()
                await self._report(self._progress(None))
        except Exception as error:  # noqa: BLE001 - it is raised by `run`
            self._failure = self._failure or error
            self._changed.set()

    async def _report(self, progress: Progress) -> None:
        if (reported := self._on_progress(progress)) is not None:
            await reported

    async def _watch_stop(self) -> None:
        await self._stop.wait()
        self._changed.set()

    def _expire(self) -> None:
        self._is_expired = True
        self._changed.set()

    def _progress(self, end: End | None) -> Progress:
        now = time.monotonic()
        self._samples.append((now, self._ends, self._tokens_out))
        while now - self._samples[0][0] > _RECENT_S:
            self._samples.popleft()
        at, ends, tokens = self._samples[0] if len(self._samples) > 1 else (self._began, 0, 0)
        seconds = max(now - at, 1e-9)
        is_waiting = bool(self._tasks) and len(self._waits) == len(self._tasks)
        return Progress(
            completed=self._log.completed,
            failed=self._log.failed,
            in_flight=len(self._tasks),
            concurrency=self._search.limit,
            tokens_in=self._tokens_in,
            tokens_out=self._tokens_out,
            dollars=self._dollars,
            seconds=now - self._began,
            lines_per_s=(self._ends - ends) / seconds,
            tokens_per_s=(self._tokens_out - tokens) / seconds,
            waiting=next(iter(self._waits.values())) if is_waiting else None,
            end=end,
        )


def _why(answer: Answer | OSError) -> str:
    if isinstance(answer, OSError):
        return str(answer) or type(answer).__name__
    return answer.body[:300].decode(errors="replace")
