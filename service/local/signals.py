"""The signals that end a command that serves or measures."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that end this command: not SIGHUP where its parent ignores it, as nohup has it.

    SIGINT always does: a shell without job control starts everything in the background with SIGINT ignored.
    """
    outlives_terminal = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in _SIGNALS if number is not signal.SIGHUP or not outlives_terminal)


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Make each of `end_signals()` raise KeyboardInterrupt, as Ctrl-C does, and restore the handlers at the end."""
    before = {number: signal.signal(number, _interrupt) for number in end_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
