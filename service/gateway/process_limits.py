"""What a process needs that holds thousands of streams: descriptors, and few looks through what stays anyway."""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator
from contextlib import contextmanager

DESCRIPTORS = 65_536  # two a stream, to the client and to the engine; shells give 1,024
_YOUNG = 50_000  # objects until a look at the new ones: a request makes some hundred, and the default is 700
_MIDDLE, _OLD = 20, 100


def expect_many_streams() -> None:
    """Raise the limit of descriptors as far as it may be raised, and collect garbage rarely, as long as it lives."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    gc.collect()
    gc.freeze()  # modules and models: they stay until the end
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)


@contextmanager
def for_many_streams() -> Iterator[None]:
    """Expect them for a while: limit and collection are put back."""
    limits, thresholds = resource.getrlimit(resource.RLIMIT_NOFILE), gc.get_threshold()
    expect_many_streams()
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
