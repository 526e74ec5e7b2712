"""A container's process: of its own, or a fork of one that has imported what all containers import."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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
        request = {
            "command": str(PROGRAM),
            "arguments": [str(self.spec)],
            "environment": dict(self.environment),
            "directory": str(self.directory),
        }
        body, caller = json.dumps(request).encode(), socket.socket(socket.AF_UNIX)
        caller.connect(str(server))
        nothing = os.open(os.devnull, os.O_RDONLY)
        files = [nothing, self.output, self.output, self.channel]
        socket.send_fds(caller, [len(body).to_bytes(4, "big")], files)
        os.close(nothing)
        caller.sendall(body)
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
