"""Starts the engine process: its session, its pipes, its environment, and a directory for all that it writes.

vLLM's sockets between its processes lie in the directory for temporary files and outlive a kill; so each engine has a
directory of its own, which is removed with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from service.engine.args import ENTRY, EngineCommand
from service.errors import EngineError

_LONGEST = 60  # a socket's path has room for 107 characters, and its name has 36 and a prefix


@dataclass(frozen=True)
class SpawnedEngine:
    """A started engine process.

    Attributes:
        process: The leader of a session and group of its own.
        commands_fd: Where the parent writes its commands.
        events_fd: Where it reads the engine's events.
        directory: The engine's own directory for temporary files.
    """

    process: subprocess.Popen[bytes]
    commands_fd: int
    events_fd: int
    directory: Path

    def remove_directory(self) -> None:
        """Remove what the engine has left, once it has ended."""
        shutil.rmtree(self.directory, ignore_errors=True)


def spawn(command: EngineCommand, python: str, variables: Mapping[str, str]) -> SpawnedEngine:
    """Start the process with these variables besides the command's. Returns at once.

    Raises:
        EngineError: The interpreter cannot be run.
    """
    try:
        directory = Path(tempfile.mkdtemp(prefix="vllm-service-", dir=_short_directory()))
    except OSError as error:
        raise EngineError(
            f"The engine's directory for temporary files cannot be made: {error.strerror}.",
            hint="Free disk space, or set TMPDIR to a directory that you may write to.",
        ) from error
    commands_read, commands_write = os.pipe()
    events_read, events_write = os.pipe()
    env = {**command.env, **variables, "ENGINE_PIPES": f"{commands_read},{events_write}"}
    env["TMPDIR"] = env["ENGINE_DIRECTORY"] = str(directory)
    env["PATH"] = f"{Path(python).parent}{os.pathsep}{env.get('PATH', os.defpath)}"  # ninja, for JIT kernels
    try:
        process = subprocess.Popen(
            [python, "-m", ENTRY, *command.argv],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(commands_read, events_write),
            start_new_session=True,
        )
    except OSError as error:
        os.close(commands_write)
        os.close(events_read)
        directory.rmdir()
        raise EngineError(
            f"The engine cannot be started with {python}: {error.strerror}.",
            hint="Delete that environment; the next start builds it again.",
        ) from error
    finally:
        os.close(commands_read)
        os.close(events_write)
    return SpawnedEngine(process, commands_write, events_read, directory)


def _short_directory() -> str | None:
    return None if len(tempfile.gettempdir()) <= _LONGEST else "/tmp"  # noqa: S108 - mkdtemp makes one of our own
