"""Standard streams whose reader may vanish: what is shown can never stop what is done."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

from service.errors import ServiceError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def lossy(stream: TextIO) -> TextIO:
    """Return a stream to the same file that drops what cannot be written.

    A terminal that was closed gives EIO, a pipe without a reader EPIPE, a full disk ENOSPC. A stream without a file,
    such as one that a test captures, is returned as it is.
    """
    try:
        raw = _LossyFile(stream.fileno(), "wb", closefd=False)
    except (OSError, ValueError):
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=stream.encoding, errors="backslashreplace", line_buffering=True
    )


def prepare() -> None:
    """Give the process the standard streams that it was started without, and a standard error that loses nothing else.

    Python has None in place of a stream whose descriptor is closed. What comes in may be other than text, and what goes
    out may have letters that a terminal's encoding lacks; neither raises.
    """
    if os.environ.get("COLUMNS") == "0":  # a terminal without a size; rich would print nothing
        del os.environ["COLUMNS"]
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115, PTH123 - open to the end
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - open to the end
    sys.stderr = lossy(sys.stderr or open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123 - open to the end
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def has_output() -> bool:
    """Tell whether the process was started with a standard output; else `prepare` has opened one by its name."""
    return getattr(sys.stdout, "name", "") != os.devnull


def is_of_output(error: OSError) -> bool:
    """Tell whether an error may come from writing to a stream: it names no file."""
    return error.filename is None and error.errno in {errno.ENOSPC, errno.EIO, errno.EPIPE, errno.EFBIG, errno.EDQUOT}


def give_up(error: OSError) -> None:
    """Write no more to standard output, which cannot be written, and say so; without a word where the reader left."""
    if error.errno != errno.EPIPE:
        failed = ServiceError(f"The output cannot be written: {error.strerror}.", hint="Write it to another place.")
        sys.stderr.write(failed.to_terminal() + "\n")
    drop_output()


def drop_output() -> None:
    """Write no more to standard output, not even what is buffered."""
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - what is still buffered must not fail once more at the exit
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


class _LossyFile(io.FileIO):
    def write(self, data: ReadableBuffer, /) -> int:
        try:
            written: int | None = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written  # None: another program made it non-blocking
