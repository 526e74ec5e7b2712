"""A benchmark that is killed leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from bench.processes import running
from tests.unit.engines import eventually

ROOT = Path(__file__).parents[3]
BENCHMARK = """
import os, signal, subprocess, sys
from bench.processes import killed_with_us

server = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], start_new_session=True)
with killed_with_us(server.pid, sys.argv[1]):
    print(server.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_benchmark_that_is_killed_takes_its_servers_and_their_files_along(tmp_path: Path) -> None:
    """Their children too, though nothing of the benchmark runs any more."""
    state = tmp_path / "state"
    state.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BENCHMARK, str(state)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=30,
    )
    pids = [int(pid) for pid in done.stdout.split()]

    assert len(pids) == 2
    assert eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert eventually(lambda: not state.exists())


@pytest.mark.parametrize("grace_s", [0, 15])
@pytest.mark.parametrize("end", ["wait", "exit"])
def test_server_ends_with_its_children_and_files(end: str, grace_s: float, tmp_path: Path) -> None:
    """Where the block fails too, and where the server has died before its children."""
    script = f'sleep 60 & echo $! $TMPDIR > "$FOUND.new"; mv "$FOUND.new" "$FOUND"; {end}'
    found = tmp_path / "found"

    with pytest.raises(SystemExit), running(["sh", "-c", script], grace_s, FOUND=str(found)) as process:
        assert eventually(found.exists)
        if end == "exit":
            process.wait(10)
        raise SystemExit("it was not ready")

    child, state = found.read_text().split()
    assert eventually(lambda: not psutil.pid_exists(int(child)))
    assert process.returncode is not None
    assert not Path(state).exists()
