"""Ctrl-C that a call swallows, or turns into another error: it ends the command all the same."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Iterator

import pytest

from service import interrupts
from service.interrupts import not_lost
from service.local.signals import signals_interrupt


@pytest.fixture(autouse=True)
def noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Note every Ctrl-C of the test, and forget it afterwards."""
    monkeypatch.setattr(interrupts._Interrupts, "came", 0)
    monkeypatch.setattr(interrupts._Interrupts, "raised", 0)
    monkeypatch.setattr(logging.getLogger("asyncio"), "disabled", False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts.note()
    yield
    signal.signal(signal.SIGINT, before)


def swallow() -> None:
    """Do as a call that ends when Ctrl-C comes."""
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def fail() -> None:
    """Do as a call that turns its cancellation into an error."""
    swallow()
    raise OSError("The connection was lost.")


def test_interrupt_that_a_block_swallows_comes_at_its_end() -> None:
    """Once: the next block, such as one that cleans up, runs."""
    assert not interrupts.came()
    with pytest.raises(KeyboardInterrupt), not_lost():
        swallow()
    assert interrupts.came()
    with not_lost():
        pass


def test_interrupt_that_became_an_error_is_an_interrupt() -> None:
    """The error is its cause; without an interrupt it stays what it was."""
    with pytest.raises(KeyboardInterrupt) as caught, not_lost():
        fail()
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(ValueError, match="wrong"), not_lost():
        raise ValueError("wrong")


def test_interrupt_silences_what_asyncio_says_of_calls_that_nobody_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    """Their errors, with tracebacks, came after the command's last sentence; one that goes on is told again."""

    async def end() -> None:
        async def lost() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                raise OSError("The client is closed.")

        tasks.append(asyncio.ensure_future(lost()))
        await asyncio.sleep(0)

    tasks: list[asyncio.Future[None]] = []
    asyncio.run(end())
    assert "unhandled exception" in caplog.text
    caplog.clear()
    swallow()
    asyncio.run(end())
    assert caplog.text == ""
    interrupts.handled()
    asyncio.run(end())
    assert "unhandled exception" in caplog.text


def test_interrupt_of_who_iterates_is_not_raised_again() -> None:
    """A generator is closed after it, in its block."""

    def numbers() -> Iterator[int]:
        with not_lost():
            yield 1
            yield 2

    iterated = numbers()
    next(iterated)
    swallow()
    iterated.close()


def test_interrupt_that_a_step_of_a_long_block_swallows_comes_at_the_next_check() -> None:
    """A log is followed for as long as its reader likes."""
    with pytest.raises(KeyboardInterrupt), not_lost():
        swallow()
        interrupts.check()
        pytest.fail("It went on.")


def test_interrupt_that_was_swallowed_before_a_block_keeps_it_from_running() -> None:
    """Else a command would go on to its end."""
    swallow()
    with pytest.raises(KeyboardInterrupt), not_lost():
        pytest.fail("It ran.")


def test_block_that_cleans_up_after_an_interrupt_runs() -> None:
    """It is being handled, so it was not lost."""
    ran = []
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        with not_lost():
            ran.append(True)
    with not_lost():
        ran.append(True)
    assert ran == [True, True]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_interrupt_that_is_held_back_comes_after_the_block(number: signal.Signals) -> None:
    """What the block has made is there to be ended; a process that begins as Ctrl-C comes is no orphan."""
    made: list[str] = []
    with signals_interrupt(), pytest.raises(KeyboardInterrupt), interrupts.held_back():
        signal.raise_signal(number)
        made.append("process")
    assert made == ["process"]


def test_interrupt_that_is_held_back_is_not_lost_when_the_block_fails() -> None:
    """It counts, as without the hold; the error is its context."""
    with pytest.raises(KeyboardInterrupt) as caught, interrupts.held_back():
        signal.raise_signal(signal.SIGINT)
        raise OSError("The connection was lost.")
    assert interrupts.came()
    assert isinstance(caught.value.__context__, OSError)


def test_interrupt_that_was_handled_came_no_more() -> None:
    """Neither the exit code nor the next block knows of it; the next one counts again."""
    swallow()
    interrupts.handled()
    assert not interrupts.came()
    with not_lost():
        pass
    with pytest.raises(KeyboardInterrupt), not_lost():
        swallow()
    assert interrupts.came()
