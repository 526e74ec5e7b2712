"""A file of lines whose size is bounded: when it is full it becomes `<name>.1`, in the place of the one before.

A device, such as /dev/null or a terminal, is never full: renamed by root, it would be gone for the whole machine.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_FULL_BYTES = 64 * 1024 * 1024


class LineFile:
    """An open file.

    Args:
        file: Where it is; what was there is replaced.
        full_bytes: Size at which it is full.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, file: Path, full_bytes: int = _FULL_BYTES) -> None:
        self._file, self._full_bytes = file, full_bytes
        self._output = self._open()
        self._is_regular = stat.S_ISREG(os.fstat(self._output.fileno()).st_mode)
        self._size = 0

    def write(self, line: str) -> None:
        """Write a line; where that is not possible the line is dropped."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: the file could not be opened again
            if self._size >= self._full_bytes and self._is_regular:
                self._output.close()
                self._file.replace(f"{self._file}.1")
                self._output, self._size = self._open(), 0
            self._output.write(line + "\n")
            self._size += len(line) + 1

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._output.close()

    def _open(self) -> TextIO:
        return self._file.open("w", buffering=1)


@contextmanager
def line_writer(file: Path) -> Iterator[Callable[[str], None]]:
    """Yield a function that writes a line to a file; where the file cannot be written the line is dropped."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = LineFile(file)
    except OSError:
        yield lambda _: None
        return
    with contextlib.closing(lines):
        yield lines.write
