"""The server of preloaded commands outlives callers that end at any moment."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import preloaded
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


def test_container_leads_its_session_once_its_pid_is_known(tmp_path: Path) -> None:
    """A test may stop or kill it at that moment, and the plane finds it by its session."""
    program = tmp_path / "program.py"
    program.write_text("import time; time.sleep(60)")
    listening = preloaded.serve(sys.executable, *preloaded.CONTAINER)
    for _ in range(20):
        with preloaded.ask(listening, [str(program)], {}, tmp_path, [0, 1, 2]) as caller:
            pid = int.from_bytes(caller.recv(4), "big")
            assert os.getsid(pid) == pid


def test_caller_that_is_gone_when_its_command_was_reported_is_no_error(server: Server) -> None:
    """Both are read at once: nothing is killed by the number of a process that has ended."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    server._abandon(ended.pid)
