"""What the engine's program imports before a CPU snapshot must not ask torch for a GPU: none is visible there."""

from __future__ import annotations

import json
import subprocess

from service.engine import environment
from service.engine.args import IN_ENGINE

LISTENER = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
import torch
from vllm_service.main import NEUTRAL
asked = []
for name in ("is_available", "device_count", "current_device", "get_device_capability", "init", "_lazy_init"):
    def listen(*args, _name=name, _real=getattr(torch.cuda, name), **kwargs):
        asked.append(_name)
        return _real(*args, **kwargs)
    setattr(torch.cuda, name, listen)
for name in NEUTRAL:
    importlib.import_module(name)
if "torch.utils.cpp_extension" in sys.modules:
    asked.append("by torch.utils.cpp_extension, where torch is built for CUDA and a toolkit is installed")
print(json.dumps({"asked": asked, "vllm": "vllm" in sys.modules, "imported": list(NEUTRAL)}))
"""


def test_neutral_imports_ask_for_no_gpu() -> None:
    """Neither torch.cuda nor vllm is touched by the imports before the hold."""
    python = environment.ensure().python
    done = subprocess.run(
        [python, "-c", LISTENER, str(IN_ENGINE)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    heard = json.loads(done.stdout.splitlines()[-1])
    assert "transformers" in heard["imported"]
    assert heard["asked"] == []
    assert not heard["vllm"]
