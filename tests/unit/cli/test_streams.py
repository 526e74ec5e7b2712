"""Streams whose reader has vanished: nothing raises, nothing hangs, the exit code says what happened."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.cli.streams import lossy
from tests.engine.running import free_port

COMMAND = Path(sys.executable).with_name("vllm-service")
PROGRAM = """
import sys
from service.cli.streams import lossy
sys.stdout = lossy(sys.stdout)
print("x" * 100_000)
print("x")
"""


@pytest.fixture
def nowhere(request: pytest.FixtureRequest) -> Iterator[int]:
    """Return a descriptor that takes nothing: a pipe without a reader, or a full disk."""
    if request.param == "pipe":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open("/dev/full", os.O_WRONLY)
    yield write
    os.close(write)


PLACES = pytest.mark.parametrize("nowhere", ["pipe", "full disk"], indirect=True)


@PLACES
def test_lossy_stream_drops_what_cannot_be_written(nowhere: int) -> None:
    """Neither a write nor the end of the process fails."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], stdout=nowhere, stderr=subprocess.PIPE, check=False)

    assert (done.returncode, done.stderr) == (0, b"")


@PLACES
def test_command_whose_error_cannot_be_shown_keeps_its_exit_code(nowhere: int) -> None:
    """A wrong name is wrong usage, whoever reads about it."""
    environment = {**os.environ, "SERVICE_PORT": str(free_port())}  # a port that is taken would be the first error
    done = subprocess.run(
        [COMMAND, "up", "no-such-model"], stdout=nowhere, stderr=nowhere, env=environment, check=False
    )

    assert done.returncode == 2


def test_lossy_stream_writes_what_can_be_written(tmp_path: Path) -> None:
    """At each line's end, and in any alphabet."""
    with (tmp_path / "out").open("w", encoding="ascii") as file:
        stream = lossy(file)
        stream.write("Zürich\n")
        assert (tmp_path / "out").read_text() == "Z\\xfcrich\n"


def test_stream_without_a_file_stays_as_it_is() -> None:
    """There is nothing that could vanish."""
    captured = io.StringIO()

    assert lossy(captured) is captured
