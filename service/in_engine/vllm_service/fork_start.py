"""Starts processes by fork, not as fresh interpreters, which would import everything again: 6 s each.

Safe as long as this process has computed nothing and used no GPU.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

START_METHOD_VARIABLE = "VLLM_WORKER_MULTIPROC_METHOD"
LIMIT_S = 60.0  # of the inspection of a model's class, which imports its module
_CONTEXT = multiprocessing.get_context("fork")
_LOGGER = logging.getLogger("vllm.vllm_service.fork_start")  # below vLLM's logger, the only one that has a handler


class ForkError(RuntimeError):
    """A call in a fork raised; the text has type and message of what it was."""


def enable_fork() -> None:
    """Let vLLM fork its engine core and inspect models in forks, unless the environment sets "spawn"."""
    if os.environ.setdefault(START_METHOD_VARIABLE, "fork") == "fork":
        _fork_core_on_cpu()
        _inspect_in_forks()


def _fork_core_on_cpu() -> None:
    """Undo that vLLM's CPU platform sets "spawn"."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    platform = type(current_platform)
    insist = platform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        insist(vllm_config)
        os.environ[START_METHOD_VARIABLE] = "fork"

    platform.check_and_update_config = staticmethod(check_and_update_config)  # type: ignore[method-assign]


def _inspect_in_forks() -> None:
    """Have vLLM inspect the class of a new model in a fork; where that fails, in its own way."""
    from vllm.model_executor.models import registry
    from vllm.utils.system_utils import get_mp_context

    fresh = registry._run_in_subprocess

    def run(look: Callable[[], Any]) -> Any:
        if get_mp_context().get_start_method() != "fork":  # vLLM decided so: CUDA is in use, or this is WSL or Ray
            return fresh(look)
        try:
            return in_fork(look, LIMIT_S)
        except Exception as error:  # noqa: BLE001 - whatever it was, vLLM's own way reports it better
            _LOGGER.warning("A model could not be inspected in a fork, so a fresh interpreter does it: %s", error)
            return fresh(look)

    registry._run_in_subprocess = run


def in_fork(call: Callable[[], Any], limit_s: float) -> Any:
    """Return what `call` returns in a fork of this process.

    Args:
        call: What it returns must be picklable.
        limit_s: The fork is killed after so long.

    Raises:
        ForkError: It raised, or its result could not be sent.
        EOFError: The fork was killed.
        TimeoutError: It took longer.
    """
    reading, writing = _CONTEXT.Pipe(duplex=False)
    with reading:
        with writing:
            child = _CONTEXT.Process(target=_send, args=(call, writing), daemon=True)
            child.start()
        try:
            if not reading.poll(limit_s):
                raise TimeoutError(f"A fork returned nothing within {limit_s:g} s.")
            result, error = reading.recv()
        finally:
            child.kill()
            child.join()
    if error is not None:
        raise ForkError(error)
    return result


def _send(call: Callable[[], Any], to: Connection) -> None:
    try:
        to.send((call(), None))
    except Exception as error:  # noqa: BLE001 - a traceback in the log would be taken for the cause of a later death
        to.send((None, f"{type(error).__name__}: {error}"))
