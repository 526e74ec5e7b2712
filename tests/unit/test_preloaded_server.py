"""The server of preloaded commands outlives callers that end at any moment."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.preloaded.server import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """One that does not serve by itself."""
    made = Server(tmp_path / "socket")
    yield made
    made._listening.close()
    made._selector.close()


def open_files() -> int:
    """Return how many this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("sent", [b"", b"\0\0", b"\0\0\0\x40", b'\0\0\0\x40{"command":'])
def test_caller_that_ends_within_its_request_is_dropped(sent: bytes, server: Server, tmp_path: Path) -> None:
    """No fork starts for it, none of its files stays open, and the server goes on."""
    before = open_files()
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(tmp_path / "socket"))
        if sent:
            socket.send_fds(caller, [sent], [0, 1, 2])
    assert server._accept() is None
    assert (server._callers, open_files()) == ({}, before)


def test_caller_that_is_gone_when_its_command_was_reported_is_no_error(server: Server) -> None:
    """Both are read at once: nothing is killed by the number of a process that has ended."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    server._abandon(ended.pid)
