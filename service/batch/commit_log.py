"""Output and error file of a batch: what has an answer is what stands in them, whatever ended the worker.

Both are appended to, a whole record at a time, so a process that is killed loses nothing but a part of one record,
which the next one cuts off. What must outlive the machine is committed at intervals.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from service.batch.lines import BadLine, Line
from service.errors import UsageError
from service.gateway.threads import in_thread

INTERVAL_S = 1.0
_ID = "batch_req_"
_BEGIN = re.compile(rb'\{"id":"([^"]*)"')
_PIECE = 1 << 20


def nothing() -> None:
    """Do nothing."""


class CommitLog:
    """The records of one batch; a line has one, in one of both files. Opening blocks.

    Args:
        output: File of the answers with status 200.
        errors: File of all other records.
        prefix: Of the records' ids, which tells them from those of other batches.
        interval_s: Between two commits.
        commit: Makes both files outlive the machine, as far as `fsync` does not. Blocks.

    Attributes:
        done: Numbers of the lines that have a record.
        completed: Records of the output.
        failed: Records of the error file.

    Raises:
        UsageError: The files are another batch's.
        OSError: They cannot be opened.
    """

    def __init__(
        self,
        output: Path,
        errors: Path,
        *,
        prefix: str = "",
        interval_s: float = INTERVAL_S,
        commit: Callable[[], None] = nothing,
    ) -> None:
        self.interval_s, self._id, self._commit = interval_s, _ID + prefix, commit
        self.done: set[int] = set()
        self.completed = self.failed = 0
        self._output = _RecordFile(output)
        self._errors = _RecordFile(errors)
        self.completed = self._take(self._output, output)
        self.failed = self._take(self._errors, errors)
        self._is_changed = True

    def add_answer(self, line: Line, status: int, request_id: str, body: bytes) -> None:
        """Record the answer to a line.

        Raises:
            OSError: It cannot be written.
        """
        response = msgspec.Raw(
            b'{"status_code":%d,"request_id":%s,"body":%s}' % (status, _json(request_id), _one_line(body))
        )
        self._add(line, response, msgspec.Raw(b"null"), is_good=status == 200)

    def add_error(self, line: Line | BadLine, code: str, message: str) -> None:
        """Record that a line has no answer.

        Raises:
            OSError: It cannot be written.
        """
        error = msgspec.Raw(_json({"code": code, "message": message, "line": line.number}))
        self._add(line, msgspec.Raw(b"null"), error, is_good=False)

    async def commit(self) -> None:
        """Make what was added outlive this machine.

        Raises:
            OSError: It cannot be written.
        """
        if self._is_changed:
            self._is_changed = False
            await in_thread(self._sync)

    def close(self) -> None:
        """Close both files; what was added is in them."""
        self._output.close()
        self._errors.close()

    def _add(self, line: Line | BadLine, response: msgspec.Raw, error: msgspec.Raw, *, is_good: bool) -> None:
        record = {"id": f"{self._id}{line.number}", "custom_id": line.custom_id, "response": response, "error": error}
        (self._output if is_good else self._errors).append(_json(record) + b"\n")
        self.done.add(line.number)
        self.completed += is_good
        self.failed += not is_good
        self._is_changed = True

    def _sync(self) -> None:
        self._output.sync()
        self._errors.sync()
        self._commit()

    def _take(self, file: _RecordFile, path: Path) -> int:
        count, prefix = 0, self._id.encode()
        for found in file.ids():
            number = found.removeprefix(prefix)
            if not (found.startswith(prefix) and number.isdigit()):
                raise UsageError(
                    f"'{path}' has the record '{found.decode(errors='replace')}', which is none of this batch.",
                    hint="Name another file, or the input that this one belongs to.",
                )
            self.done.add(int(number))
            count += 1
        return count


class _RecordFile:
    """A file of records, one a line."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._path, self._size = path, 0

    def ids(self) -> Iterator[bytes]:
        """Yield the ids of all whole records, and cut off what follows them."""
        with self._path.open("rb", buffering=_PIECE) as file:
            for line in file:
                begin = _BEGIN.match(line)
                if not (begin and line.endswith(b"}\n") and b"\0" not in line):  # zeros where a page was not written
                    break
                self._size += len(line)
                yield begin[1]
        os.ftruncate(self._file, self._size)

    def append(self, record: bytes) -> None:
        """Write a whole record, or nothing."""
        try:
            written = 0
            while written < len(record):
                written += os.write(self._file, memoryview(record)[written:])
        except BaseException:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(record)

    def sync(self) -> None:
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


def _one_line(body: bytes) -> bytes:
    """Return the JSON of an answer without line breaks; what is no JSON becomes a string."""
    if body[:1] == b"{" and b"\n" not in body and b"\r" not in body:
        return body
    try:
        return msgspec.json.format(body, indent=-1)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _json(body.decode(errors="replace"))


_json = msgspec.json.encode
