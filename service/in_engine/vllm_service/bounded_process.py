"""Does work that may crash, hang or eat memory in a process of bounded time and memory beside this one.

The process is a fork of this one, so that it starts in milliseconds with everything imported. It starts with the first
job, ends after a while without one, and ends with this process, whoever dies first; killed without a job, it is reaped
at once, and the next job gets another. Each job runs in a fork of its own (`bounded_fork`), which alone is killed when
a job exceeds its bound or nobody waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

from vllm_service import bounded_fork
from vllm_service.bounded_fork import Bounds, Work

START_S = 30.0  # a fork that does not answer within it is stuck; the work's preparation is part of a job
IDLE_S = 300.0
_ANSWER_BYTES = 1 << 24
_log = logging.getLogger("vllm.vllm_service.bounded_process")  # below vLLM's logger, the only one that has a handler


class ProcessLostError(Exception):
    """The process could not be started, or was lost; the next job gets a new one. The job may be without fault."""


class BoundedProcess:
    """One process, one job at a time. Belongs to one event loop, which runs in the main thread.

    Args:
        work: What is done there.
        bounds: Of one job.
        idle_s: Seconds without a job after which the process ends.
    """

    def __init__(self, work: Work, bounds: Bounds, *, idle_s: float = IDLE_S) -> None:
        self._work, self._bounds, self._idle_s = work, bounds, idle_s
        self._turn = asyncio.Lock()
        self._process: _Process | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._ids = itertools.count()

    @property
    def pid(self) -> int | None:
        """The process's id while it runs."""
        return self._process.pid if self._process else None

    async def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a job. Cancelling this kills the job.

        Raises:
            ProcessLostError: There is no answer, for a reason that is not the job's.
        """
        async with self._turn:
            if self._idle:
                self._idle.cancel()
            try:
                process = self._process = self._process or await _start(self._work, self._bounds, self._stop_idle)
                return await process.ask({**job, "id": next(self._ids)}, self._bounds.wall_s + START_S)
            except (OSError, EOFError, TimeoutError, ValueError) as error:
                await self._stop()
                _log.warning("The process that compiles structured outputs was lost: %r", error)
                raise ProcessLostError from error
            finally:
                self._idle = asyncio.get_running_loop().call_later(self._idle_s, self._stop_idle)

    async def close(self) -> None:
        """End the process."""
        async with self._turn:
            if self._idle:
                self._idle.cancel()
            await self._stop()

    def _stop_idle(self) -> None:
        if not self._turn.locked():
            self._closing = asyncio.ensure_future(self.close())

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if process:
            await process.stop()


class _Process:
    """The other process: its id, and the connection to it."""

    def __init__(self, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.pid, self._reader, self._writer = pid, reader, writer

    async def ask(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        self._writer.write(json.dumps(job).encode() + b"\n")
        try:
            async with asyncio.timeout(timeout_s):
                await self._writer.drain()
                while (answer := await self._answer())["id"] != job["id"]:
                    pass  # of a job that was cancelled when it had just ended
                return answer
        except asyncio.CancelledError:
            self._writer.write(bounded_fork.CANCEL)
            raise

    async def _answer(self) -> dict[str, Any]:
        line = await self._reader.readline()
        if not line.endswith(b"\n"):
            raise EOFError("its end of the connection is closed")
        return dict(json.loads(line))

    async def stop(self) -> None:
        self._writer.close()
        await asyncio.get_running_loop().run_in_executor(None, _kill, self.pid)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # its job dies with it: see bounded_fork
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


class _Answers(asyncio.StreamReader):
    """What the process answers; its end is told at once, also where no job waits for an answer."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        super().__init__(limit=_ANSWER_BYTES)
        self._on_end = on_end

    def feed_eof(self) -> None:
        super().feed_eof()
        self._on_end()


async def _start(work: Work, bounds: Bounds, on_end: Callable[[], None]) -> _Process:
    """Fork the process; `on_end` is called when it has ended.

    Raises:
        OSError: There are no processes, descriptors or memory left for it.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        parent = os.getpid()
        if (pid := os.fork()) == 0:
            bounded_fork.serve(theirs, parent, work, bounds)
    ours.setblocking(False)
    reader = _Answers(on_end)
    protocol = asyncio.StreamReaderProtocol(reader)
    loop = asyncio.get_running_loop()
    try:
        transport, _ = await loop.create_unix_connection(lambda: protocol, sock=ours)
    except BaseException:  # cancelled among them
        ours.close()
        _kill(pid)
        raise
    return _Process(pid, reader, asyncio.StreamWriter(transport, protocol, reader, loop))
