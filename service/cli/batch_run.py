"""Runs `vllm-service batch`: answers every line of the input once, and goes on where an earlier run has ended."""

from __future__ import annotations

import asyncio
import csv
import fcntl
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from service import interrupts
from service.batch.commit_log import CommitLog
from service.batch.concurrency import ConcurrencySearch
from service.batch.lines import BadLine, Line
from service.batch.worker import Progress, Send, drive
from service.cli import batch_rows
from service.cli.batch_display import BatchDisplay
from service.cli.batch_input import BatchInput, Request
from service.cli.terminal import print_json, results_console
from service.errors import ServiceError, UsageError
from service.files import require_writable
from service.local.signals import end_signals

_RECORD = b'{"id":"batch_req_'
Sender = Callable[[], AbstractAsyncContextManager[Send]]


@dataclass(frozen=True)
class Outputs:
    """The files of a batch.

    Attributes:
        named: What the user named.
        answers: Records of the answers; `named` itself, but for a table.
        errors: Records of the lines that have none.
    """

    named: Path
    answers: Path
    errors: Path

    @property
    def table(self) -> Path | None:
        """The table of answers; None: they are JSON lines."""
        return self.named if self.named != self.answers else None


def outputs(named: Path, source: BatchInput) -> Outputs:
    """Return the files that a batch writes.

    Raises:
        UsageError: They cannot be written, have something else, or one is the input.
    """
    is_table = batch_rows.is_table(named)
    if is_table and source.form != "table":
        raise UsageError(
            f"'{named}' is a table, and '{source.path}' is none.", hint=f"Write JSON lines: -o {named.stem}.jsonl."
        )
    answers = named.with_name(f"{named.stem}.answers.jsonl") if is_table else named
    found = Outputs(named, answers, named.with_name(f"{named.stem}.errors.jsonl"))
    for file in (found.named, found.answers, found.errors):
        require_writable(file, is_replaced=True)
        if file.exists() and file.samefile(source.path):
            raise UsageError(f"'{file}' is the input, and would be written.", hint="Name another file with -o.")
    for file in (found.answers, found.errors):
        _check_ours(file)
    if found.table and named.exists() and not (_has_records(found.answers) or _has_records(found.errors)):
        raise UsageError(
            f"'{named}' has something else than a batch's answers: '{found.answers}' has no records of them.",
            hint="Name another file with -o, or remove this one.",
        )
    return found


def _check_ours(file: Path) -> None:
    with suppress(FileNotFoundError), file.open("rb") as opened:
        begin = opened.read(len(_RECORD))
        if begin != _RECORD[: len(begin)]:
            raise UsageError(f"'{file}' has something else than a batch's records.", hint="Name another file with -o.")


def _has_records(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def run(
    source: BatchInput, request: Request, files: Outputs, sender: Sender, search: ConcurrencySearch, *,
    lines: Callable[[Iterable[Line | BadLine]], Iterable[Line | BadLine]] = iter, as_json: bool = False,
) -> None:  # fmt: skip
    """Answer the lines that have no record yet, show how far it is, and print what came of it.

    Args:
        source: The input.
        request: What makes requests of it.
        files: Get the records.
        sender: Gives what sends a line.
        search: Says how many are sent at a time.
        lines: Changes lines before they are sent.
        as_json: Print an object.

    Raises:
        typer.Exit: It was interrupted.
        ServiceError: Lines have failed, or the files cannot be written.
    """
    with _alone(files.answers):
        total = source.count()
        try:
            log = CommitLog(files.answers, files.errors, prefix=f"{source.digest()}_")
        except UsageError as error:
            raise UsageError(
                f"'{files.answers}' or '{files.errors}' has answers to another input, or by other options.",
                hint="Name another file with -o, or give the options of the earlier run.",
            ) from error
        earlier = log.completed + log.failed
        try:
            with BatchDisplay(total, earlier) as display:
                progress = _driven(lines(source.lines()), sender, log, search, display.show)
        except OSError as error:
            raise ServiceError(
                f"'{files.answers}' cannot be written: {error.strerror or error}.",
                hint="Make room there; what is written is kept, and the same command goes on.",
            ) from error
        finally:
            log.close()
        if files.table:
            _write_table(source, request, files, files.table)
    if progress is None:
        kept = f"{log.completed + log.failed:,} of {total:,} lines are kept"
        typer.echo(f"Stopped. {kept}; the same command goes on from there.", err=True)
        raise typer.Exit(130)
    _print(source, files, total, earlier, progress, as_json=as_json)
    if progress.failed:
        raise ServiceError(
            f"{progress.failed:,} of {total:,} lines failed: '{files.errors}' has each with its number.",
            hint="Without that file, the same command sends them again, and no other.",
        )


def _driven(
    lines: Iterable[Line | BadLine],
    sender: Sender,
    log: CommitLog,
    search: ConcurrencySearch,
    show: Callable[[Progress], None],
) -> Progress | None:
    """Return how it ended; None: a signal ended it, and what was done is recorded."""
    was_stopped = False

    async def main() -> Progress:
        nonlocal was_stopped
        task = asyncio.current_task()

        def stop() -> None:
            nonlocal was_stopped
            was_stopped = True
            if task:
                task.cancel()

        for number in end_signals():
            asyncio.get_running_loop().add_signal_handler(number, stop)
        async with sender() as send:
            return await drive(lines, send, log, search=search, on_progress=show)

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        if was_stopped:
            return None
        raise
    finally:
        interrupts.handled()


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Hold a file for this process: a second command would answer the same lines.

    Raises:
        UsageError: Another process holds it.
    """
    opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"Another 'vllm-service batch' writes '{file}'.", hint="Wait for its end, or name another file with -o."
            ) from None
        yield
    finally:
        os.close(opened)


def _write_table(source: BatchInput, request: Request, files: Outputs, table: Path) -> None:
    """Write the rows of the input, in their order, with what answers there are as columns. Blocks."""
    places = _places(files.answers), _places(files.errors)
    columns = batch_rows.answer_columns(request.schema, source.columns)
    part = table.with_name(f".{table.name}.{secrets.token_hex(4)}.tmp")
    try:
        part.touch(0o600)  # as the records are: it has their answers
        with part.open("w", encoding="utf-8", newline="") as out, files.answers.open("rb") as answers, \
                files.errors.open("rb") as errors:  # fmt: skip
            writer = csv.writer(out, delimiter=batch_rows.delimiter(table), lineterminator="\n")
            writer.writerow([*source.columns, *columns, "error"])
            for row in source.rows():
                cells, error = [""] * len(columns), ""
                if (at := places[0].get(row.number)) is not None:
                    text, reason = _text(_record(answers, at))
                    try:
                        cells = batch_rows.answer_cells(request.schema, text)
                    except ValueError:
                        error = f"the answer is no JSON object of the schema (finish_reason: {reason}): {text}"
                elif (at := places[1].get(row.number)) is not None:
                    error = _error(_record(errors, at))
                given = [""] * len(source.columns) if isinstance(row, BadLine) else list(row.fields.values())
                writer.writerow([*given, *cells, error])
        part.replace(table)
    except OSError as error:
        raise ServiceError(
            f"'{table}' cannot be written: {error.strerror}.",
            hint="Make room there; the answers are kept, and the same command writes them again.",
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _places(file: Path) -> dict[int, int]:
    """Return where the record of each line begins in a file."""
    found, at = dict[int, int](), 0
    with file.open("rb") as opened:
        for raw in opened:
            number = raw[len(_RECORD) : raw.index(b'"', len(_RECORD))].rpartition(b"_")[2]
            found[int(number)] = at
            at += len(raw)
    return found


def _record(file: Any, at: int) -> Any:
    file.seek(at)
    return json.loads(file.readline())


def _text(record: Any) -> tuple[str, str]:
    choice = record["response"]["body"]["choices"][0]
    return choice["message"].get("content") or "", str(choice.get("finish_reason"))


def _error(record: Any) -> str:
    if record["error"]:
        return str(record["error"]["message"])
    body = record["response"]["body"]
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("message")) if isinstance(error, dict) else str(body)


def _print(source: BatchInput, files: Outputs, total: int, earlier: int, progress: Progress, *, as_json: bool) -> None:
    rate = progress.tokens_out / progress.seconds if progress.seconds else 0.0
    if as_json:
        print_json(
            {
                "input": str(source.path),
                "output": str(files.named),
                "errors": str(files.errors),
                "lines": total,
                "completed": progress.completed,
                "failed": progress.failed,
                "earlier": earlier,
                "tokens_in": progress.tokens_in,
                "tokens_out": progress.tokens_out,
                "tokens_per_second": round(rate, 1),
                "dollars": round(progress.dollars, 8),
                "seconds": round(progress.seconds, 3),
            }
        )
        return
    cost = f", ${progress.dollars:.4f}" if progress.dollars else ""
    before = f", {earlier:,} of them by earlier runs" if earlier else ""
    results_console().print(
        f"{progress.completed:,} of {total:,} lines are answered in {files.named}{before}: "
        f"{progress.tokens_in:,} tokens in, {progress.tokens_out:,} out, {rate:,.1f} tokens/s, "
        f"{progress.seconds:.1f} s{cost}",
        markup=False,
    )
