"""A call in a fork of this process: its result, or that there is none."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
from vllm_service import fork_start


def test_fork_returns_what_the_call_returns() -> None:
    """It is another process, and what it changes is its own."""
    changed: list[int] = []

    def call() -> tuple[int, list[int]]:
        changed.append(1)
        return os.getpid(), changed

    pid, there = fork_start.in_fork(call, 10)
    assert pid != os.getpid()
    assert (there, changed) == ([1], [])
    assert multiprocessing.active_children() == []


def test_fork_that_raises_reports_the_error(capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing of it is on stderr: the first traceback of an engine's log is taken for the cause of its death."""
    with pytest.raises(fork_start.ForkError, match="ZeroDivisionError: division by zero"):
        fork_start.in_fork(lambda: 1 / 0, 10)
    with pytest.raises(fork_start.ForkError, match="pickle"):
        fork_start.in_fork(lambda: lambda: 1, 10)
    assert capfd.readouterr().err == ""


def test_fork_that_is_killed_has_no_result() -> None:
    """As the kernel does when memory runs out."""
    with pytest.raises(EOFError):
        fork_start.in_fork(lambda: os.kill(os.getpid(), signal.SIGKILL), 10)
    assert multiprocessing.active_children() == []


def test_fork_that_hangs_is_killed() -> None:
    """Nothing is left of it."""
    with pytest.raises(TimeoutError, match=r"within 0\.1 s"):
        fork_start.in_fork(lambda: time.sleep(60), 0.1)
    assert multiprocessing.active_children() == []
