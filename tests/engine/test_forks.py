"""A model's class that the pinned vLLM has not met before is looked at in a fork, and no fresh interpreter starts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from service import engine_env
from service.engine_args import IN_ENGINE

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from vllm.model_executor.models import registry
from vllm_service import forks
interpreters, start = [], registry._run_in_subprocess
def fresh(look):
    interpreters.append(look)
    return start(look)
registry._run_in_subprocess = fresh
forks.prefer()
known = registry.ModelRegistry.models["Qwen3ForCausalLM"]
assert known.inspect_model_cls().is_text_generation_model
assert not interpreters
assert known.module_name not in sys.modules
forks.in_fork = lambda look, limit_s: 1 / 0
assert registry.ModelRegistry.models["LlamaForCausalLM"].inspect_model_cls().is_text_generation_model
assert len(interpreters) == 1
"""


def test_unmet_model_is_inspected_in_a_fork(tmp_path: Path) -> None:
    """The look is vLLM's own, with a fork in place of its interpreter; where that fails, vLLM's own way is taken."""
    python = engine_env.ensure(lambda _: None).python
    done = subprocess.run(
        [python, "-c", PROGRAM, str(IN_ENGINE)],
        env={**os.environ, "VLLM_CACHE_ROOT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "modelinfos").iterdir())) == 2
