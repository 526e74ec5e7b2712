"""Asks the kernel whether a range of a file is in the page cache. Changes nothing."""

from __future__ import annotations

import os

_NOWAIT = getattr(os, "RWF_NOWAIT", 0)  # a Python built against an old glibc lacks it


def is_cached(fd: int, begin: int, end: int, step: int) -> bool:
    """Tell whether the bytes from `begin` to `end` are in the page cache, by a sample: one every `step`, and the last.

    A sampled byte takes 2 microseconds. False where the system gives no answer, such as in gVisor.
    Source: google/gvisor, `regularFileFD.PRead` (EOPNOTSUPP for every flag of preadv2 but one).
    """
    if not _NOWAIT:
        return False
    try:
        return all(os.preadv(fd, [bytearray(1)], offset, _NOWAIT) for offset in (*range(begin, end, step), end - 1))
    except (OSError, NotImplementedError):  # EAGAIN: it would have to read the disk; others: no answer
        return False
