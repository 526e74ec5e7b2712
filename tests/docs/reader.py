"""A reader of the docs: a clone of the repository and a home directory, in which the commands of the pages run."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from service.engine.pip_settings import uv_settings
from tests.engine.running import ONE_THREAD, POLL_S

from .blocks import PLACEHOLDER, Block, exceptions
from .clone import lay_clone

HUB_TOKEN = "hf_of_the_docs"
# What stands for the reader's own values, and what the test puts there.
VALUES = {
    "bob=<key>": "bob=sk-of-bob-77c1",
    "<key>": "sk-of-the-docs-5b1e",
    "wk-…": "wk-of-the-docs",
    "ws-…": "ws-of-the-docs",
    "sk-…": "sk-of-the-docs-5b1e",
    "=…": "=sk-of-the-docs-5b1e",
    "<token>": HUB_TOKEN,
    "--host 0.0.0.0": "--host 127.0.0.1",
}
# Commands that run until Ctrl-C, and what they have printed once they do what the page says.
UNTIL_CTRL_C = {
    r"make serve|vllm-service up\b": "Ctrl-C stops it.",
    r"litellm --config": "Uvicorn running on",
}
_ASKS_SERVICE = re.compile(r"\$VLLM_|vllm-service (connect|chat)\b")  # blocks that take the service's URL for given
_COMMAND_S = 180
_STOPPED = {0, 130, -signal.SIGINT, -signal.SIGTERM}
_OURS = ("SERVICE_", "API_KEY", "VLLM_", "MODAL_", "HF_", "XDG_", "LITELLM_", "OPENAI_", "MODEL")
_WHAT_TO_DO = """
Every command of a page works as it is written. Correct the page; or, where a command needs something:
- a value of the reader's, such as <key>: give it one in VALUES (tests/docs/reader.py),
- a command that runs until Ctrl-C: UNTIL_CTRL_C, with the words that it has printed when it works,
- a file or a directory: the fixture `reader` (tests/docs/test_shell_blocks.py) lays it,
- what no machine of the tests can do: tests/docs/exceptions.toml, with its reason (15 at most)."""


class CommandFailedError(AssertionError):
    """A command of a page does not do what the page says."""

    def __init__(self, block: Block, command: str, what: str) -> None:
        super().__init__(f"{block.page}:{block.line}: $ {command}\n{what}\n{_WHAT_TO_DO}")


class Reader:
    """Runs blocks, in the clone and with an environment that has what a page takes for given.

    Args:
        directory: Empty; the clone and the home go there.
        programs: Directories with programs that a page has the reader install.
        service: URL of the service, for pages that name it in a variable.
        environment: Where the control plane and the hub are.
    """

    def __init__(self, directory: Path, programs: list[Path], service: str, **environment: str) -> None:
        self._variables = {"VLLM_GATEWAY_URL": service, "VLLM_API_KEY": "none"}
        self.clone, self._home, self._output = directory / "clone", directory / "home", directory / "output"
        self._home.mkdir()
        lay_clone(self.clone)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
        tools = [_pip(directory / "pip"), self.clone / ".venv/bin", *programs]
        path = os.pathsep.join([*map(str, tools), os.environ["PATH"]])
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
        home = {"HOME": str(self._home), "XDG_CACHE_HOME": cache, "HF_HOME": str(directory / "hub"), "PATH": path}
        registries = {**uv_settings().env, "npm_config_dry_run": "true", "npm_config_update_notifier": "false"}
        self.environment = {**inherited, **ONE_THREAD, **registries, **home, "COLUMNS": "80", **environment}

    def run(self, block: Block, values: Mapping[str, str]) -> None:
        """Run a block's commands in their order; variables that it sets are there for its next ones."""
        variables: list[str] = []
        for command in block.commands:
            if command in exceptions():
                continue
            runnable = command
            for placeholder, value in {**VALUES, **values}.items():
                runnable = runnable.replace(placeholder, value)
            if left := PLACEHOLDER.search(runnable):
                raise CommandFailedError(block, command, f"{left[0]} stands for a value of the reader's.")
            self._run(block, command, "\n".join([*variables, runnable]))
            if re.match(r"(export )?\w+=\S*$|export ", runnable):
                variables.append(runnable)

    def _run(self, block: Block, command: str, script: str) -> None:
        environment = {**self.environment, **(self._variables if _ASKS_SERVICE.search(block.text) else {})}
        stays = command.endswith("&")
        with _terminal() as terminal, self._output.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", f"{script}\nwait" if stays else script],
                cwd=self.clone,
                env=environment,
                stdin=terminal,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                failure = self._failure(process, command, signal.SIGTERM if stays else signal.SIGINT)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if failure:
            raise CommandFailedError(block, command, f"{failure}:\n{self._said}")

    @property
    def _said(self) -> str:
        return self._output.read_text(errors="replace")

    def _failure(self, process: subprocess.Popen[bytes], command: str, stop: signal.Signals) -> str:
        """Wait until a command has ended, or does its work and is stopped; return what is wrong."""
        words = next((words for pattern, words in UNTIL_CTRL_C.items() if re.search(pattern, command)), None)
        deadline = time.monotonic() + _COMMAND_S
        while process.poll() is None and (words is None or words not in self._said):
            if time.monotonic() > deadline:
                return f"still runs after {_COMMAND_S} s" + (f", without '{words}'" if words else "")
            time.sleep(POLL_S)
        if words and process.poll() is not None:
            return f"ended with {process.returncode}, before '{words}'"
        if words:
            os.killpg(process.pid, stop)
            return (
                "" if process.wait(_COMMAND_S) in _STOPPED else f"ended with {process.returncode} when it was stopped"
            )
        if "curl" in command and re.search(r'"error": ?{', self._said):
            return "an API error"
        return f"ended with {process.returncode}" if process.returncode else ""


@contextlib.contextmanager
def _terminal() -> Iterator[int]:
    """Open a terminal on which a command may ask; the answers are there already."""
    master, slave = pty.openpty()
    os.write(master, b"y\n" * 4)
    try:
        yield slave
    finally:
        os.close(master)
        os.close(slave)


def _pip(directory: Path) -> Path:
    """Make a `pip` that looks up what it would install; return its directory."""
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, str(directory)], check=True)
    program = directory / "bin/pip"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(uv)} pip "$@" --dry-run --quiet --python {directory}\n')
    program.chmod(0o755)
    return program.parent
