"""Run with the ENGINE's python: boots vLLM with random weights, and tells what it allocated for the KV cache.

Reads one JSON object with `model`, `memory_bytes`, `dtype` and `max_num_batched_tokens` a line; prints one with
`tokens` that a cache of this size holds, `request_bytes` at the longest context, and what decides them, or `error`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def main() -> None:
    """Answer each line of the input."""
    output, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        case = json.loads(line)
        try:
            answer = _booted(case)
        except Exception:  # noqa: BLE001 - it is the answer
            answer = {"error": traceback.format_exc()}
        output.write(json.dumps(answer) + "\n")
        output.flush()
        gc.collect()


def _options(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": case["model"],
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "enforce_eager": True,
        "kv_cache_memory_bytes": case["memory_bytes"],
        "kv_cache_dtype": case["dtype"],
        "max_num_batched_tokens": case["max_num_batched_tokens"],
        "max_num_seqs": 8,
    }


def _booted(case: dict[str, Any]) -> dict[str, Any]:
    """Boot the engine, generate a few tokens, and tell what it allocated."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    engine = LLM(**_options(case), distributed_executor_backend="uni")
    prompt, sampling = TokensPrompt(prompt_token_ids=[1, 2, 3]), SamplingParams(max_tokens=8, detokenize=False)
    generated = engine.generate(prompt, sampling, use_tqdm=False)
    config = engine.llm_engine.vllm_config
    core = engine.llm_engine.engine_core.engine_core
    answer = _told(config, core.scheduler.kv_cache_config)
    return answer | {"generated": len(generated[0].outputs[0].token_ids)}


def _told(config: Any, cache: Any) -> dict[str, Any]:
    from vllm.v1.core import kv_cache_utils

    length = config.model_config.max_model_len
    tokens, _ = kv_cache_utils.get_kv_cache_capacity(config, cache)
    return {
        "tokens": tokens,
        "max_model_len": length,
        "request_bytes": kv_cache_utils._max_memory_usage_bytes_from_groups(config, cache.kv_cache_groups),
        "num_blocks": cache.num_blocks,
        "in_flight_tokens": config.max_in_flight_tokens,
        "ssm_dtype": config.cache_config.mamba_ssm_cache_dtype,
        "block_size": config.cache_config.block_size,
        "groups": [f"{len(group.layer_names)} x {group.kv_cache_spec}" for group in cache.kv_cache_groups],
    }


if __name__ == "__main__":
    main()
