"""Ctrl-C while the modules of the command are imported."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = """
import os, signal, sys
from service.cli.start import main

class Interrupts:
    def find_spec(self, name, path, target=None):
        if name == "service.cli.main":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
sys.argv = ["vllm-service", "models", "--json"]
main()
"""


@pytest.mark.parametrize(("ignored", "code"), [(False, 130), (True, 0)])
def test_interrupt_during_the_import_ends_without_a_traceback(tmp_path: Path, ignored: bool, code: int) -> None:
    """A process that was started to ignore it goes on."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.returncode, done.stderr) == (code, "")
    assert bool(done.stdout) == ignored
