"""Times build, sleep and wake of one engine on a GPU, and compares canary generations before and after.

`bench/gpu_boot.py` runs it with the interpreter that has vLLM; it prints one JSON object as its last line. It builds
vLLM's engine itself, so it also runs with other versions than the pinned one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from typing import Any

BATCH, TOKENS = 32, 256


def main() -> None:
    """Measure one variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--spawned-at", type=float, required=True, help="CLOCK_MONOTONIC when this was spawned")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--cpu", action="store_true", help="test the script itself, without a GPU")
    arguments = parser.parse_args()
    facts = asyncio.run(measure(arguments))
    sys.stdout.write(json.dumps(facts) + "\n")


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures: seconds, GiB, tokens/s."""
    import torch
    import vllm
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm_service import canary

    imported = time.monotonic()
    options: dict[str, Any] = {"enable_sleep_mode": True, "gpu_memory_utilization": 0.9}
    if arguments.cpu:
        options = {"kv_cache_memory_bytes": 64 * 1024**2, "distributed_executor_backend": "uni"}
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=arguments.model, load_format="dummy", enforce_eager=arguments.eager, max_model_len=2048, **options
        )
    )
    first = await canary.generate_canary(engine, with_logprobs=True)
    built = time.monotonic()
    facts: dict[str, Any] = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "import_s": imported - arguments.spawned_at,
        "build_s": built - imported,
        "used_awake_gib": _used_gib(),
        "tokens_per_s_before": await _tokens_per_s(engine),
    }
    sleeps: list[float] = []
    wakes: list[float] = []
    different: list[str] = []
    for _ in range(arguments.cycles):
        before = await canary.generate_canary(engine, with_logprobs=True)
        began = time.monotonic()
        await engine.sleep(level=1)
        asleep = time.monotonic()
        facts["used_asleep_gib"] = _used_gib()
        woken = time.monotonic()
        await engine.wake_up()
        await engine.reset_prefix_cache()
        wakes.append(time.monotonic() - woken)
        sleeps.append(asleep - began)
        different += filter(None, [canary.compare(before, await canary.generate_canary(engine, with_logprobs=True))])
    last = canary.compare(first, await canary.generate_canary(engine, with_logprobs=True))
    engine_after = await _tokens_per_s(engine)
    engine.shutdown()
    return facts | {
        "sleep_s": statistics.median(sleeps),
        "wake_s": statistics.median(wakes),
        "wake_slowest_s": max(wakes),
        "different": different + ([f"at the end: {last}"] if last else []),
        "tokens_per_s_after": engine_after,
    }


async def _tokens_per_s(engine: Any) -> float:
    """Return the throughput of a batch, all requests together; the first of two runs is a warm-up."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)

    async def one(number: int) -> None:
        prompt = {"prompt_token_ids": list(range(10 + number, 74 + number))}
        async for _ in engine.generate(prompt, sampling, request_id=f"rate-{number}-{time.monotonic_ns()}"):
            pass

    for _ in range(2):
        began = time.monotonic()
        await asyncio.gather(*(one(number) for number in range(BATCH)))
        seconds = time.monotonic() - began
    return BATCH * TOKENS / seconds


def _used_gib() -> float:
    """Return the GPU memory that all processes use together; 0 without a GPU."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]) / 1024
    except (OSError, subprocess.CalledProcessError):
        return 0.0


if __name__ == "__main__":
    main()
