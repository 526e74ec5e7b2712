"""Commands of this environment without the time that an interpreter takes to import them.

`modal deploy` takes 1.0 s of processor time, most of it for imports, and the tests run hundreds of commands. A server,
one for each process of pytest, imports them once; a command is a fork of it with the environment, the directory and
the files of its caller. `client.py` is what the caller starts: it passes signals on and ends as the command ends. A
command finds it as `sys.executable`, so what it starts in turn is as quick. Any other program of this interpreter runs
as usual.
"""

from __future__ import annotations

import atexit
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOCKET = "PRELOADED_SOCKET"
_HERE = Path(__file__).parent


@functools.cache
def _directory() -> Path:
    """Start the server; return the directory of its socket and of the executable that is its client."""
    held = tempfile.TemporaryDirectory(prefix="preloaded-")
    directory = Path(held.name)
    executable = directory / "python"
    executable.write_text(f"#!{sys.executable} -SI\n{(_HERE / 'client.py').read_text()}")
    executable.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.preloaded.server", str(directory)],
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
    return directory


def python() -> str:
    """Return the executable to run in place of `sys.executable`, with `-m modal …` or `vllm-service …` behind it."""
    return str(_directory() / "python")


def environment() -> dict[str, str]:
    """Return the variables that it needs."""
    return {SOCKET: str(_directory() / "socket"), "PRELOADED_PYTHON": os.fspath(sys.executable)}
