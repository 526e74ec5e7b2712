"""The signals that end vLLM's processes do so only once the parent has ordered the end.

A supervisor such as systemd signals every process of a service at once. The parent then drains the requests in flight,
and needs its engine for that. So every process of the engine blocks these signals, and the end comes by the parent
pipe: with the command `terminate`, or with the end of the pipe when the parent has ended. vLLM ends its workers by a
pipe of their own; only the engine core needs SIGTERM, from the API server.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from vllm_service.parent_pipe import DIRECTORY_VARIABLE

_PR_SET_PDEATHSIG = 1
_SIGNALS = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM}
_MARK = "ending"  # a file in the engine's own directory: the API server ends, and with it the engine core


def block() -> None:
    """Block the signals in this thread, and in all threads and processes that it starts from now on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def end() -> None:
    """End this process, the API server, as vLLM ends at SIGTERM. Main thread only."""
    with contextlib.suppress(OSError):  # a full disk: the core then ignores SIGTERM, and vLLM kills it after a while
        _mark().touch()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGTERM)


def look_at_no_ports() -> None:
    """Keep vLLM's server from asking who else has its port, which raises where a killed core has had it until now."""
    from vllm.entrypoints.launchers import launcher

    launcher.find_process_using_port = lambda _port: None


def enable() -> None:
    """Let the engine core end with the API server."""
    from vllm.v1.engine.core import EngineCoreProc

    for core in (EngineCoreProc, *EngineCoreProc.__subclasses__()):
        if run := vars(core).get("run_busy_loop"):
            core.run_busy_loop = _ended_by_api_server(run)


def _ended_by_api_server(run: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return the core's loop with a signal handler that heeds the API server only; vLLM's own is set before it runs."""

    def run_busy_loop(core: Any) -> None:
        handler = signal.getsignal(signal.SIGTERM)
        assert callable(handler), "vLLM set no handler"  # noqa: S101 - a vLLM that this was not written for

        def handle(number: int, frame: FrameType | None) -> None:
            if _mark().exists():
                handler(number, frame)

        _die_with_parent()
        signal.set_wakeup_fd(-1)  # a forked core has the API server's, which would take the core's signals for its own
        signal.signal(signal.SIGTERM, handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        try:
            run(core)
        finally:
            _collect_no_garbage()

    return run_busy_loop


def _die_with_parent() -> None:
    """End with the API server, however that ends: an idle core does not notice that it was killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _collect_no_garbage() -> None:
    """Spare the ending process two collections of vLLM's, which take longer than it has before it is killed.

    They look at all that imports made, 1.1 s in a forked core. The process's end frees what they would free.
    """
    gc.freeze()
    gc.unfreeze = lambda: None


def _mark() -> Path:
    return Path(os.environ[DIRECTORY_VARIABLE], _MARK)
