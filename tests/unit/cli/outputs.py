"""What the tests of the command line expect of its output."""

from __future__ import annotations


def check_error(stderr: str) -> None:
    """Insist on one line with the error and at most one with a hint, and nothing else."""
    error, *hints = stderr.splitlines()
    assert error.startswith("error: "), stderr
    assert [hint.startswith("hint: ") for hint in hints] in ([], [True]), stderr
    assert stderr.endswith("\n")
