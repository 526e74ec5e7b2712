"""Runs vLLM's own benchmark of a served model: `python -m vllm_service.bench`, a job on stdin, its result on stdout.

It needs vLLM's package alone, no engine and no tokenizer: prompts come with the job, the service counts tokens. The
key is in the variable OPENAI_API_KEY, which vLLM's request functions read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from typing import Any

_BACKEND = "openai-chat"
_PATH = "/v1/chat/completions"


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Send the job's requests; return what vLLM's benchmark measured of each."""
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    requests = [
        SampleRequest(prompt=prompt, prompt_len=1, expected_output_len=job["output_tokens"], request_id=str(number))
        for number, prompt in enumerate(job["prompts"])
    ]
    return asyncio.run(
        benchmark(
            task_type=TaskType.GENERATION,
            endpoint_type=_BACKEND,
            api_url=job["url"] + _PATH,
            base_url=job["url"],
            model_id=job["model"],
            model_name=job["model"],
            tokenizer=None,
            input_requests=requests,
            logprobs=None,
            request_rate=job["rate"] or float("inf"),
            burstiness=1.0,
            disable_tqdm=False,
            num_warmups=0,
            profile=False,
            selected_percentile_metrics=[],
            selected_percentiles=[50.0],
            ignore_eos=True,
            goodput_config_dict={},
            max_concurrency=job["concurrency"],
            lora_modules=None,
            extra_headers=None,
            extra_body=None,
            ready_check_timeout_sec=0,  # a request of ours has woken the model
        )
    )


def main() -> None:
    """Read the job and write the result; what the benchmark prints goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        result = run(json.load(sys.stdin))
    json.dump(result, sys.stdout, default=float)


if __name__ == "__main__":
    main()
