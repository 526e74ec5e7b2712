"""What `vllm-service plan` counts of a KV cache, against what vLLM allocates. `python -m bench.kv_cache`.

A real engine boots on a tiny model of each kind of attention, with random weights and a cache of a given size.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.kv_shapes import FP8, SHAPES
from bench.report import RESULTS, Report
from service.engine import environment
from service.engine.cache_layers import cache_layers
from service.engine.kv_cache import KVCache

MEMORY_BYTES = 64 * 1024**2
LIMIT_PERCENT = 3.0
_LIMIT_S = 900


def main() -> int:
    """Boot every shape; return 1 if a figure is off by more than 3 %."""
    report, shapes = Report("kv_cache"), {}
    report.versions |= {"vllm": environment.versions("cpu")["vllm"]}
    for name, config in SHAPES.items():
        dtype = "fp8" if name == FP8 else "auto"
        measured = boot(config, dtype)
        # the platform's own of the CPU build, before it is fitted to states
        measured |= {
            "memory_bytes": MEMORY_BYTES,
            "dtype": dtype,
            "base_block": 16 if "kv_lora_rank" in config else 128,
        }
        shapes[name] = measured
        layers = cache_layers(config | {"mamba_ssm_dtype": measured["ssm_dtype"]}, dtype=dtype)
        cache = KVCache.of(layers, measured["in_flight_tokens"], block=measured["base_block"])
        length = measured["max_model_len"]
        counted = cache.sequences(MEMORY_BYTES, length) * length
        report.add(f"{name}: tokens, off by", off(counted, measured["tokens"]), LIMIT_PERCENT, "%")
        request = off(cache.request_bytes(length), measured["request_bytes"])
        report.add(f"{name}: bytes of a request, off by", request, LIMIT_PERCENT, "%")
    code = report.finish()
    file = RESULTS / "kv_cache.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shapes": shapes}, indent=2) + "\n")
    return code


def off(counted: float, measured: float) -> float:
    """Return by how many percent a figure is off."""
    return abs(counted / measured - 1) * 100


def boot(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return what an engine tells that boots on this model."""
    with TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config))
        case = {"model": directory, "memory_bytes": MEMORY_BYTES, "dtype": dtype, "max_num_batched_tokens": 2048}
        done = subprocess.run(
            [environment.ensure("cpu").python, str(Path(__file__).with_name("kv_engine.py"))],
            input=json.dumps(case) + "\n",
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
    if done.returncode or not done.stdout:
        raise SystemExit(f"The engine ended with {done.returncode}:\n{done.stderr[-4000:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        raise SystemExit(answer["error"])
    return answer


if __name__ == "__main__":
    sys.exit(main())
