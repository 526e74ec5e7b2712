"""Commands and containers without the time that an interpreter takes to import them.

`modal deploy` takes 1.0 s of processor time, most of it for imports, and the tests run hundreds of commands. A server,
one for each process of pytest, imports them once; a command is a fork of it with the environment, the directory and
the files of its caller. `client.py` is what the caller starts: it passes signals on and ends as the command ends. A
command finds it as `sys.executable`, so what it starts in turn is as quick. Any other program of this interpreter runs
as usual.

Containers of the control plane are forks of further servers, one for each interpreter; `ask` starts them.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

SOCKET = "PRELOADED_SOCKET"
CONTAINER = ("modal._container_entrypoint", "modal._runtime.asgi")  # what Modal's program imports in every container
_HERE = Path(__file__).parent


@functools.cache
def serve(python: str, *modules: str, path: str = "") -> Path:
    """Start a server that ends with this process; return its socket.

    Args:
        python: Its interpreter.
        modules: What it imports to run other programs than the commands.
        path: A directory with modules that the interpreter itself has not.
    """
    held = tempfile.TemporaryDirectory(prefix="preloaded-")
    listening = Path(held.name, "socket")
    server = subprocess.Popen(
        [python, "-m", "tests.preloaded.server", str(listening), *([path, *modules] if modules else [])],
        cwd=_HERE.parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the test run
    )
    assert server.stdin
    assert server.stdout
    assert server.stdout.readline() == b"ready\n"

    def end() -> None:
        server.communicate()  # it ends with its input
        held.cleanup()

    atexit.register(end)
    return listening


@functools.cache
def _socket() -> Path:
    """Start the server of the commands, with its client as an executable beside the socket."""
    listening = serve(sys.executable)
    executable = listening.with_name("python")
    executable.write_text(f"#!{sys.executable} -SI\n{(_HERE / 'client.py').read_text()}")
    executable.chmod(0o755)
    return listening


def ask(
    server: Path, command: Sequence[str], environment: Mapping[str, str], directory: Path, files: Sequence[int]
) -> socket.socket:
    """Have a server run a Python program in a fork that leads a session.

    Args:
        server: Its socket.
        command: The program's file, and its arguments.
        environment: All its variables.
        directory: Where it runs.
        files: What it gets as files 0, 1, 2 and 3.

    Returns:
        A socket from which its pid is read, and its exit code when it has ended: four bytes each. Closing it kills it.
    """
    request = {
        "command": command[0],
        "arguments": command[1:],
        "environment": dict(environment),
        "directory": str(directory),
    }
    body, caller = json.dumps(request).encode(), socket.socket(socket.AF_UNIX)
    caller.connect(str(server))
    socket.send_fds(caller, [len(body).to_bytes(4, "big")], files)
    caller.sendall(body)
    return caller


def python() -> str:
    """Return the executable to run in place of `sys.executable`, with `-m modal …` or `vllm-service …` behind it."""
    return str(_socket().with_name("python"))


def environment() -> dict[str, str]:
    """Return the variables that it needs."""
    return {SOCKET: str(_socket()), "PRELOADED_PYTHON": os.fspath(sys.executable)}
