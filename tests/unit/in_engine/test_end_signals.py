"""What the engine core is spared at its end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import service.in_engine

PROGRAM = """
import gc
from vllm_service import end_signals

end_signals._collect_no_garbage()
gc.unfreeze()  # as vLLM does
print(gc.get_freeze_count() > 1000, len(gc.get_objects()) < 1000)
"""


def test_core_that_ends_has_nothing_to_collect() -> None:
    """All objects stay frozen, though vLLM lets them go before it collects."""
    path = Path(service.in_engine.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={"PYTHONPATH": str(path)}, capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == ["True", "True"]
