"""Which signals end a command, and that they interrupt it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from service.local.signals import end_signals, signals_interrupt


@pytest.fixture(params=[signal.SIG_DFL, signal.SIG_IGN], ids=["as usual", "under nohup"])
def hang_up(request: pytest.FixtureRequest) -> Iterator[signal.Handlers]:
    """Return what this process does at SIGHUP."""
    before = signal.signal(signal.SIGHUP, request.param)
    yield request.param
    signal.signal(signal.SIGHUP, before)


def test_hang_up_ends_a_command_unless_it_was_started_to_ignore_it(hang_up: signal.Handlers) -> None:
    """The others always do."""
    always = {signal.SIGINT, signal.SIGTERM}

    assert set(end_signals()) == (always if hang_up is signal.SIG_IGN else always | {signal.SIGHUP})


def test_signals_interrupt_until_the_block_ends(hang_up: signal.Handlers) -> None:
    """Then all is as it was before; what is ignored stays so throughout."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    for number in end_signals():
        with pytest.raises(KeyboardInterrupt), signals_interrupt():
            os.kill(os.getpid(), number)
    with signals_interrupt():
        assert (signal.getsignal(signal.SIGHUP) is signal.SIG_IGN) == (hang_up is signal.SIG_IGN)

    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
