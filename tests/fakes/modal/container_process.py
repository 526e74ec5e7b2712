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


class ContainerProcess(Protocol):
    """What both have in common."""

    @property
    def pid(self) -> int: ...

    async def wait(self) -> int:
        """Wait for its end; return its exit code, or the negative number of the signal that ended it."""


async def begin(
    python: str, spec: Path, directory: Path, environment: Mapping[str, str], output: int, channel: int
) -> ContainerProcess:
    """Start a process of its own, which leads a session.

    Args:
        python: Its interpreter.
        spec: The argument of its program.
        directory: Where it runs.
        environment: All its variables.
        output: The file of what it prints.
        channel: A file that it gets under the same number.
    """
    return await asyncio.create_subprocess_exec(
        python,
        str(PROGRAM),
        str(spec),
        cwd=directory,
        env=dict(environment),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=output,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        pass_fds=[channel],
    )


@dataclass(frozen=True)
class Fork:
    """A fork of the server that `tests.preloaded.serve` starts."""

    pid: int
    _caller: socket.socket

    async def wait(self) -> int:
        """Wait for its end; return its exit code, or the negative number of the signal that ended it."""
        with self._caller:
            code = await asyncio.get_running_loop().sock_recv(self._caller, 4)
        return int.from_bytes(code, "big", signed=True) if code else -signal.SIGKILL  # the server has ended, so it too


async def fork(
    server: Path, spec: Path, directory: Path, environment: Mapping[str, str], output: int, channel: int
) -> Fork:
    """Start a fork, which leads a session. As `begin`; it gets the channel under the number 3."""
    request = {
        "command": str(PROGRAM),
        "arguments": [str(spec)],
        "environment": dict(environment),
        "directory": str(directory),
    }
    body, caller = json.dumps(request).encode(), socket.socket(socket.AF_UNIX)
    caller.connect(str(server))
    nothing = os.open(os.devnull, os.O_RDONLY)
    socket.send_fds(caller, [len(body).to_bytes(4, "big")], [nothing, output, output, channel])
    os.close(nothing)
    caller.sendall(body)
    caller.setblocking(False)
    return Fork(int.from_bytes(await asyncio.get_running_loop().sock_recv(caller, 4), "big"), caller)
