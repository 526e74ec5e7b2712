"""Starts the engine process: its session, its pipes, its environment, and a directory for all that it writes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from service.engine import private_directory
from service.engine.args import ENTRY, EngineCommand
from service.errors import EngineError


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
        private_directory.remove(self.directory)


def spawn(command: EngineCommand, python: str, variables: Mapping[str, str]) -> SpawnedEngine:
    """Start the process with these variables besides the command's. Returns at once.

    Raises:
        EngineError: The interpreter cannot be run.
    """
    try:
        directory, lock = private_directory.create()
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
            pass_fds=(commands_read, events_write, lock),
            start_new_session=True,
        )
    except OSError as error:
        os.close(commands_write)
        os.close(events_read)
        private_directory.remove(directory)
        raise EngineError(
            f"The engine cannot be started with {python}: {error.strerror}.",
            hint="Delete that environment; the next start builds it again.",
        ) from error
    finally:
        for descriptor in (commands_read, events_write, lock):
            os.close(descriptor)
    return SpawnedEngine(process, commands_write, events_read, directory)
