"""Start `make serve` as the first thing on a fresh machine, paste what the README shows, press Ctrl-C; twice.

Standard library only: nothing is built yet. The hub is taken as out of reach, so that this needs none. The second start
must reuse what the first built without a word about it. Neither may print more than a line a step.
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
LINES = {"first": 40, "second": 25}  # a step is a line; the installer's list of packages was 290
LINE_EVERY_S = 10  # while packages are installed and no terminal could show a bar


def main() -> None:
    """Serve twice."""
    first = serve("first")
    second = serve("second")
    assert "Building" in first, first
    assert "No model hub is in reach (" in first, first
    assert ": HF_HUB_OFFLINE is set), so this serves the built-in 'tiny' model" in first, first
    assert "Building" not in second, second


def serve(which: str) -> str:
    """Run `make serve` until it is ready, use it, stop it; return all that it said."""
    with TemporaryDirectory() as directory:
        output = Path(directory, "output")
        began = time.monotonic()
        with output.open("wb") as stream:
            command = ["make", "serve"]
            process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=stream,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )
        try:
            while "Ctrl-C stops it." not in output.read_text():
                assert process.poll() is None, f"make serve ended with {process.returncode}:\n{output.read_text()}"
                assert time.monotonic() - began < READY_S[which], f"not ready:\n{output.read_text()}"
                time.sleep(0.05)
            said, took_s = output.read_text(), time.monotonic() - began
            sys.stdout.write(f"{which} `make serve`: ready after {took_s:.0f} s, {len(said.splitlines())} lines\n")
            assert len(said.splitlines()) <= LINES[which] + took_s / LINE_EVERY_S, said
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
    """Run the curl line of the README, which must be the one that was printed."""
    readme = Path("README.md").read_text()
    begin = readme.index("curl http://")
    line = readme[begin : readme.index("```", begin)].strip()
    assert line in said, f"the README shows\n{line}\nand this was printed:\n{said}"
    command = shlex.split(line.replace("\\\n", " "))
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


if __name__ == "__main__":
    main()
