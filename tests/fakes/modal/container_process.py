"""A container's process: of its own, or a fork of one that has imported what all containers import."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests import preloaded

PROGRAM = Path(__file__).with_name("container_main.py")
CHANNEL_OF_A_FORK = 3


class ContainerProcess(Protocol):
    """What both have in common."""

    @property
    def pid(self) -> int: ...

    async def wait(self) -> int:
        """Wait for its end; return its exit code, or the negative number of the signal that ended it."""


@dataclass(frozen=True)
class Start:
    """How a container's process starts, as the leader of a session.

    Attributes:
        spec: The argument of its program.
        directory: Where it runs.
        environment: All its variables.
        output: The file of what it prints.
        channel: A file that it gets; a process of its own under the same number.
    """

    spec: Path
    directory: Path
    environment: Mapping[str, str]
    output: int
    channel: int

    async def with_interpreter(self, python: str) -> ContainerProcess:
        """Start a process of its own."""
        return await asyncio.create_subprocess_exec(
            python,
            str(PROGRAM),
            str(self.spec),
            cwd=self.directory,
            env=dict(self.environment),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=self.output,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[self.channel],
        )

    async def in_fork(self, server: Path) -> ContainerProcess:
        """Start a fork of the server that `tests.preloaded.serve` has started; this is its socket."""
        nothing = os.open(os.devnull, os.O_RDONLY)
        files = [nothing, self.output, self.output, self.channel]
        caller = preloaded.ask(server, [str(PROGRAM), str(self.spec)], self.environment, self.directory, files)
        os.close(nothing)
        caller.setblocking(False)
        pid = int.from_bytes(await asyncio.get_running_loop().sock_recv(caller, 4), "big")
        return _Fork(pid, caller)


@dataclass(frozen=True)
class _Fork:
    pid: int
    _caller: socket.socket

    async def wait(self) -> int:
        with self._caller:
            code = await asyncio.get_running_loop().sock_recv(self._caller, 4)
        return int.from_bytes(code, "big", signed=True) if code else -signal.SIGKILL  # it has ended with the server
