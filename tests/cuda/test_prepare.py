"""`prepare` of a CPU snapshot with the CUDA build: Modal shows no GPU while it takes one."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import psutil

from service.engine.args import IN_ENGINE, engine_command
from service.engine.process import EngineProcess, State
from service.registry.models import Registry
from tests.processor_time import bare_s

from .test_choices import HERE, TINY, claim_of

CPU_LIMIT = 400  # times the processor time of a Python that does nothing; 210 to 240 were measured
IMPORTS = """
import importlib, json, os, sys, time
for name in json.loads(sys.argv[2]):
    importlib.import_module(name)
held = "vllm" in sys.modules
sys.path[:0] = [sys.argv[1]]
import claimed_gpu
claimed_gpu.claim_gpu(json.loads(sys.argv[3]))
from vllm_service.main import SERVER
for name in SERVER:
    importlib.import_module(name)
print(json.dumps({"held": held, "vllm": "vllm" in sys.modules}))
"""


def test_prepare_of_a_cpu_snapshot_touches_no_gpu_and_opens_no_socket(
    cuda_python: str, driver_stub: Path, tmp_path: Path
) -> None:
    """The engine is held after its neutral imports: the driver was not called, so a checkpoint can be taken."""
    calls = tmp_path / "calls"
    command = engine_command(Registry.load().specs["tiny"], TINY, parent_env=os.environ)
    env = {**command.env, "LD_LIBRARY_PATH": str(driver_stub), "CUDA_STUB_CALLS": str(calls)}
    engine = EngineProcess(replace(command, env=env), python=cuda_python, hold="imported", neutral_imports=True)
    engine.spawn()
    try:
        engine.wait_for(State.IMPORTED, 120)
        process = psutil.Process(engine.pid)
        used = process.cpu_times()
        assert process.net_connections() == []
        assert [file.path for file in process.open_files() if "nvidia" in file.path] == []
        assert not calls.exists(), calls.read_text()
    finally:
        engine.stop(0)
    assert used.user + used.system <= CPU_LIMIT * bare_s()


def test_imports_after_the_hold_find_the_gpu_that_is_there_then(cuda_python: str, driver_stub: Path) -> None:
    """VLLM decides its platform when it is imported: what comes before the hold has not imported it."""
    env = dict(engine_command(Registry.load().specs["tiny"], TINY, parent_env=os.environ).env)
    neutral = [cuda_python, "-c", "from vllm_service import main; import json; print(json.dumps(main.NEUTRAL))"]
    names = subprocess.run(neutral, env=env, capture_output=True, text=True, timeout=120, check=True).stdout
    done = subprocess.run(
        [cuda_python, "-c", IMPORTS, str(HERE), names, json.dumps(claim_of("H100"))],
        env=env | {"LD_LIBRARY_PATH": str(driver_stub), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(IN_ENGINE)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"held": False, "vllm": True}
