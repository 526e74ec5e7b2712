"""Records of batches that several threads read for the first time at the same moment."""

from __future__ import annotations

import subprocess
import sys

READ = """
import sys, threading
sys.setswitchinterval(1e-6)
import msgspec
from service.batch.store import Batch
names = ("id", "endpoint", "input_file_id", "completion_window", "output_id", "error_id")
data = msgspec.json.encode(Batch(created_at=1, expires_at=2, metadata={"a": "b"}, **dict.fromkeys(names, "x")))
together = threading.Barrier(6)
def read():
    together.wait()
    for _ in range(5):
        msgspec.json.decode(data, type=Batch)
threads = [threading.Thread(target=read) for _ in range(6)]
for one in threads:
    one.start()
for one in threads:
    one.join()
"""


def test_first_reads_of_threads_at_once_read_the_record() -> None:
    """Where msgspec looks at a type in two threads at once the interpreter crashes: in two of three of these runs."""
    for _ in range(6):
        command = [sys.executable, "-X", "tracemalloc=10", "-c", READ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")
