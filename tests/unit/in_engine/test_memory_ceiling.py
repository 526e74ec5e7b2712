"""The ceiling of the API server's memory, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from vllm_service import memory_ceiling

PROGRAM = """
import sys
from vllm_service import memory_ceiling
memory_ceiling.prefer_as_victim()
memory_ceiling.limit_growth(64 << 20)
kept = bytearray(32 << 20)
try:
    bytearray(int(sys.argv[1]) << 20)
except MemoryError:
    print("refused", end=" ")
print(open("/proc/self/oom_score_adj").read().strip())
"""

FAMILY = """
import os, sys
from vllm_service import memory_ceiling
(waiting, go), (reading, saying) = os.pipe(), os.pipe()
if not os.fork():
    if not os.fork():
        os.read(waiting, 1)
        try:
            bytearray(64 << 20)
        except MemoryError:
            os.write(saying, b"refused")
        os._exit(0)
    os.wait()
    os._exit(0)
os.close(saying)
memory_ceiling.limit_children(32 << 20)
bytearray(64 << 20)
os.write(go, b"x")
print(os.read(reading, 100).decode())
"""


@pytest.mark.parametrize(("mib", "said"), [(16, "500\n"), (64, "refused 500\n")])
def test_allocation_beyond_the_growth_is_refused_and_the_process_goes_on(mib: int, said: str) -> None:
    """What is within it is not; and the kernel would rather kill this process than its parent."""
    path = str(Path(memory_ceiling.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(mib)], env={"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )

    assert done.stdout == said


def test_children_and_theirs_are_limited_and_the_process_is_not() -> None:
    """The engine core is a child of the API server, its workers are children of the core."""
    path = str(Path(memory_ceiling.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", FAMILY], env={"PYTHONPATH": path}, capture_output=True, text=True, timeout=60, check=True
    )

    assert done.stdout == "refused\n"


def test_memory_that_is_not_counted_is_not_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit above nothing would refuse everything."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self/status").write_text("VmRSS:\t 100 kB\nVmData:\t 0 kB\n")
    monkeypatch.setattr(memory_ceiling, "_PROC", tmp_path)
    monkeypatch.setattr(memory_ceiling.resource, "prlimit", lambda *_: pytest.fail("limited"))

    memory_ceiling.prefer_as_victim()
    memory_ceiling.limit_growth(1)
