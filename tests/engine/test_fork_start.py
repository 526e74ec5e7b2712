"""A model's class that the pinned vLLM has not met before is looked at in a fork, and no fresh interpreter starts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from service.engine import environment
from service.engine.args import IN_ENGINE

PROGRAM = """
import os, sys
sys.path.insert(0, sys.argv[1])
from vllm.model_executor.models import registry
from vllm_service import fork_start
interpreters, start = [], registry._run_in_subprocess
forked, fork = [], fork_start.in_fork
def fresh(look):
    interpreters.append(look)
    return start(look) if len(interpreters) == 1 else look()
def counted(look, limit_s):
    forked.append(look)
    return fork(look, limit_s)
registry._run_in_subprocess, fork_start.in_fork = fresh, counted
fork_start.enable_fork()
known = registry.ModelRegistry.models["Qwen3ForCausalLM"]
assert known.inspect_model_cls().is_text_generation_model
assert (len(forked), len(interpreters)) == (1, 0)
assert known.module_name not in sys.modules
fork_start.in_fork = lambda look, limit_s: 1 / 0
assert registry.ModelRegistry.models["LlamaForCausalLM"].inspect_model_cls().is_text_generation_model
assert (len(forked), len(interpreters)) == (1, 1)
fork_start.in_fork = counted
os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # as vLLM has it under WSL, or once CUDA is in use
assert registry.ModelRegistry.models["MistralForCausalLM"].inspect_model_cls().is_text_generation_model
assert (len(forked), len(interpreters)) == (1, 2)
"""


def test_unmet_model_is_inspected_in_a_fork(tmp_path: Path) -> None:
    """The look is vLLM's own, with a fork in place of its interpreter.

    Where that fails, or where vLLM would not fork, its own way is taken.
    """
    python = environment.ensure().python
    done = subprocess.run(
        [python, "-c", PROGRAM, str(IN_ENGINE)],
        env={**os.environ, "VLLM_CACHE_ROOT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "A model could not be inspected in a fork" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    assert len(list((tmp_path / "modelinfos").iterdir())) == 3
