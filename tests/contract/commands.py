"""The command `vllm-service` with an account of the control plane, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests import preloaded
from tests.fakes.modal import ModalPlane
from tests.processor_time import ended

COMMAND = Path(sys.executable).with_name("vllm-service")
_OURS = ("SERVICE_", "MODAL_", "HF_", "VLLM_")


def processor_time(plane: ModalPlane, *command: str) -> float:
    """Run a program to its end, imports included; return the processor time (in seconds) that it took."""
    process = _popen(plane, command, into=subprocess.DEVNULL)
    used_s = ended(process)
    assert process.returncode == 0, command
    return used_s


def started(plane: ModalPlane, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start the command in another directory, with no input and without access to a hub."""
    return _popen(plane, (str(COMMAND), *arguments), **environment)


def diagnosed(plane: ModalPlane, code: int, **environment: str) -> dict[str, tuple[str, str, str]]:
    """Run `doctor`, and return state, text and next step of each check."""
    done = run(plane, "doctor", "--json", XDG_STATE_HOME=str(plane.workdir), **environment)
    assert (done.returncode, done.stderr) == (code, ""), (done.stdout, done.stderr)
    return {one["check"]: (one["state"], one["text"], one["next"]) for one in json.loads(done.stdout)}


def run(
    plane: ModalPlane, *arguments: str, given: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in the same way to its end, preloaded, with this on its standard input."""
    stdin = subprocess.DEVNULL if given is None else subprocess.PIPE
    command = (preloaded.python(), COMMAND.name, *arguments)
    with _popen(plane, command, stdin=stdin, **preloaded.environment(), **environment) as process:
        out, err = process.communicate(given, timeout=180)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _popen(
    plane: ModalPlane,
    command: Sequence[str],
    *,
    into: int = subprocess.PIPE,
    stdin: int = subprocess.DEVNULL,
    **environment: str,
) -> subprocess.Popen[str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    return subprocess.Popen(
        command,
        env={**ours, "COLUMNS": "80", "HF_ENDPOINT": "http://127.0.0.1:9", **plane.env, **environment},
        cwd=plane.workdir,
        stdin=stdin,
        stdout=into,
        stderr=into,
        text=True,
    )
