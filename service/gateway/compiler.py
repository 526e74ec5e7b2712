"""The process that compiles grammars, seen from the gateway: started with the first job, ended when idle."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("grammar_process.py")
COMPILE_S = 5.0  # of one processor
START_S = 30.0  # it imports torch
IDLE_S = 120.0  # 270 MB are held as long
RETRY_S = 60.0  # after a start that failed
ROOM_BYTES = 1 << 30  # beyond what its libraries map
_PATIENCE = 4  # times COMPILE_S, on a machine that is busy with something else
_log = logging.getLogger(__name__)


class NoCompilerError(Exception):
    """The process cannot be started; there is nothing wrong with the job."""


class SilentCompilerError(Exception):
    """The process was lost, or had no time for the job; it has been ended, and the next job gets a new one."""


class Compiler:
    """One process, one job at a time.

    Args:
        python: Interpreter of the engine's environment.
        compile_s: Seconds of processor time that a job may take.
        start_s: Seconds until the process must be ready.
        idle_s: Seconds without a job after which it is ended.
    """

    def __init__(
        self, python: str, *, compile_s: float = COMPILE_S, start_s: float = START_S, idle_s: float = IDLE_S
    ) -> None:
        self._python, self._compile_s, self._start_s, self._idle_s = python, compile_s, start_s, idle_s
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._idle: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None
        self._retry_at = 0.0
        self._logged = False

    async def compile(self, job: dict[str, str]) -> dict[str, str]:
        """Return the process's answer: `verdict` and `reason`.

        Raises:
            NoCompilerError: It cannot be started.
            SilentCompilerError: It gave no answer.
        """
        async with self._turn:
            self._keep()
            try:
                for _ in range(2):
                    if answer := await self._attempt(job):
                        return answer
                raise SilentCompilerError
            finally:
                self._idle = asyncio.get_running_loop().call_later(self._idle_s, self._end_idle)

    async def _attempt(self, job: dict[str, str]) -> dict[str, str] | None:
        """Return the answer; None when the process has ended, which no job makes it do."""
        process = await self._running()
        try:
            async with asyncio.timeout(self._compile_s * _PATIENCE):
                return await _exchange(process, job)
        except TimeoutError:
            await self._end()
            raise SilentCompilerError from None
        except (OSError, ValueError):
            await self._end()
            return None
        except BaseException:  # cancelled: the next job would read this one's answer
            _kill(process)
            raise

    async def close(self) -> None:
        """Stop the process, and wait until it has ended."""
        self._keep()
        if self._process:
            _kill(self._process)
        async with self._turn:
            self._keep()
            await self._end()

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process and self._process.returncode is not None:
            await self._end()
        if self._process is None:
            if asyncio.get_running_loop().time() < self._retry_at:
                raise NoCompilerError
            try:
                await self._start()
            except (TimeoutError, OSError, ValueError) as error:
                await self._end()
                self._complain(error)
                raise NoCompilerError from error
        assert self._process is not None  # noqa: S101 - _start returns with one
        return self._process

    async def _start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            self._python,
            "-I",
            str(PROGRAM),
            str(self._compile_s),
            str(ROOM_BYTES),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            cwd="/",
            env=_environment(),
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(self._start_s):
                word = await _answer(self._process)
        except BaseException:
            _kill(self._process)
            raise
        if "ready" not in word:
            raise ValueError(word.get("failed"))

    def _complain(self, error: Exception) -> None:
        self._retry_at = asyncio.get_running_loop().time() + RETRY_S
        if not self._logged:
            self._logged = True
            _log.warning(
                "Grammars are not compiled at the gateway, only by engines: %s did not start (%s).",
                self._python,
                str(error) or type(error).__name__,
            )

    def _keep(self) -> None:
        if self._idle:
            self._idle.cancel()
            self._idle = None

    def _end_idle(self) -> None:
        self._idle = None
        self._ending = asyncio.ensure_future(self._end_if_idle())

    async def _end_if_idle(self) -> None:
        async with self._turn:
            if self._idle is None:  # no job came between
                await self._end()

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process:
            _kill(process)
            await process.wait()
            if process.stdin:
                process.stdin.close()


async def _exchange(process: asyncio.subprocess.Process, job: dict[str, str]) -> dict[str, str]:
    assert process.stdin is not None  # noqa: S101 - _start opens pipes
    process.stdin.write(json.dumps(job).encode() + b"\n")
    await process.stdin.drain()
    return await _answer(process)


async def _answer(process: asyncio.subprocess.Process) -> dict[str, Any]:
    """Read one line.

    Raises:
        ValueError: The process has ended, or its line is no JSON object.
    """
    assert process.stdout is not None  # noqa: S101 - _start opens pipes
    line = await process.stdout.readline()
    if not line:
        raise ValueError(f"it ended with code {await process.wait()}")
    return dict(json.loads(line))


def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill the process and its fork: a group of their own, which exists until its leader is reaped."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _environment() -> dict[str, str]:
    """Return an environment without keys, tokens, and GPUs."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {"PATH": os.defpath, "LANG": "C.UTF-8", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", **threads}
