"""Limits of a process that holds thousands of streams: more file descriptors, and rarer garbage collection."""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator
from contextlib import contextmanager

DESCRIPTORS = 65_536  # two a stream, to the client and to the engine; the default of shells is 1,024
_RESERVED = 128  # for files, pipes of engines and libraries
_YOUNG = 50_000  # new objects until a collection: a request makes some hundred, and the default is 700
_MIDDLE, _OLD = 20, 100


def raise_process_limits() -> None:
    """Raise the limit of file descriptors as far as allowed, and collect garbage rarely, until the process ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    gc.collect()
    gc.freeze()  # modules and models, which live until the end
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)


def connection_limit() -> int:
    """Return how many clients this process can serve at a time: each needs a descriptor, and one to an engine."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, ((DESCRIPTORS if soft == resource.RLIM_INFINITY else soft) - _RESERVED) // 2)


@contextmanager
def raised_process_limits() -> Iterator[None]:
    """Raise the limits within a context, and restore them afterwards."""
    limits, thresholds = resource.getrlimit(resource.RLIMIT_NOFILE), gc.get_threshold()
    raise_process_limits()
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
