"""Start `make serve` as the first thing on a fresh machine, paste what it prints, press Ctrl-C; twice.

Standard library only: nothing is built yet. The second start must reuse what the first built, and say nothing about it.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

READY_S = {"first": 900, "second": 180}


def main() -> None:
    """Serve twice."""
    first = serve("first")
    second = serve("second")
    assert "Building" in first, first
    assert "Building" not in second, second


def serve(which: str) -> str:
    """Run `make serve` until it is ready, use it, stop it; return all that it said."""
    with TemporaryDirectory() as directory:
        output = Path(directory, "output")
        began = time.monotonic()
        with output.open("wb") as stream:
            command = ["make", "serve", "MODEL=tiny"]
            process = subprocess.Popen(
                command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, start_new_session=True
            )
        try:
            while "Ctrl-C stops it." not in output.read_text():
                assert process.poll() is None, f"make serve ended with {process.returncode}:\n{output.read_text()}"
                assert time.monotonic() - began < READY_S[which], f"not ready:\n{output.read_text()}"
                time.sleep(0.05)
            said = output.read_text()
            sys.stdout.write(f"{which} `make serve`: ready after {time.monotonic() - began:.0f} s\n")
            assert "Paris" in paste_curl(said)
        finally:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return said


def paste_curl(said: str) -> str:
    """Run the curl line that was printed."""
    lines = said.replace("\\\n", " ").splitlines()
    line = next(line for line in lines if line.startswith("curl "))
    return subprocess.run(shlex.split(line), capture_output=True, text=True, check=True, timeout=60).stdout


if __name__ == "__main__":
    main()
