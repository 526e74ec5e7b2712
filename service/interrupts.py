"""Ctrl-C that must not be lost: it ends a command that speaks to Modal, whatever the call in progress makes of it.

Modal's client runs its calls in a thread of its own, and cancels the call in progress when KeyboardInterrupt comes. The
interrupt is lost where the call ends at that moment, and becomes another error where the call turns the cancellation
into one (synchronicity 0.12.7, `_run_function_sync`: what the call returns or raises after its cancellation counts).
Other calls of that thread may end by an error too, which nobody waits for: asyncio's log of them is off from then on.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ASYNCIO_LOG = logging.getLogger("asyncio")
_RAISING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Interrupts:
    came = 0
    raised = 0  # those of which KeyboardInterrupt was seen on its way


def note() -> None:
    """Have each Ctrl-C noted from now on; it raises KeyboardInterrupt as before."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def came() -> bool:
    """Tell whether one has come that `handled` has not taken back."""
    return _Interrupts.came > 0


def handled() -> None:
    """Forget those that came: the command has caught KeyboardInterrupt, goes on, and ends as without it."""
    _Interrupts.came = _Interrupts.raised = 0
    _ASYNCIO_LOG.disabled = False


@contextmanager
def not_lost() -> Iterator[None]:
    """Raise KeyboardInterrupt where one came within the block or before it, and was lost; not while one is handled."""
    check()
    try:
        yield
    except KeyboardInterrupt:
        _Interrupts.raised = _Interrupts.came
        raise
    except GeneratorExit:  # who iterates over the block has ended, by that Ctrl-C or otherwise
        raise
    except BaseException as error:
        _raise_lost(error)
        raise
    check()


def check() -> None:
    """Raise KeyboardInterrupt where one came before and was lost; for a block that goes on for long."""
    _raise_lost()


@contextmanager
def held_back() -> Iterator[None]:
    """Hold Ctrl-C, and other signals that raise, back until the block has ended; then they do as they did."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        came.append(number)

    held = [number for number in _RAISING if callable(signal.getsignal(number))]
    before = {number: signal.signal(number, note) for number in held}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:  # after an error of the block too
            signal.raise_signal(came[0])


def _raise_lost(instead_of: BaseException | None = None) -> None:
    if _Interrupts.came > _Interrupts.raised:
        _Interrupts.raised = _Interrupts.came
        if not isinstance(sys.exception(), KeyboardInterrupt):
            raise KeyboardInterrupt from instead_of


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    _Interrupts.came += 1
    _ASYNCIO_LOG.disabled = True
    raise KeyboardInterrupt
