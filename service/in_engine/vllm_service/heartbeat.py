"""The engine's heartbeat: emitted only while tokens are generated, or could be. The parent kills an engine without one.

An engine can hang with its port open and `/health` green. While requests run, the heartbeat is the progress of vLLM's
own counters; while none run, or no counter moves, it is one token that the engine has to generate. It runs in the API
server's own event loop, so a server that hangs has none either. A model that does not generate is asked for nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from vllm_service import canary

LOOK_S = 5.0  # how often the counters are looked at, at least
PROBE_S = 30.0  # how often an idle engine is asked for a token, at least
_STEPS = "vllm:iteration_tokens_total_count"  # of a histogram: one observation per step that gave tokens


def intervals(hang_s: float) -> tuple[float, float]:
    """Return how often to look and how often to probe, for a parent that waits `hang_s` for a heartbeat."""
    return min(LOOK_S, hang_s / 4), min(PROBE_S, hang_s / 2)


async def run_heartbeat(engine: Any, emit: Callable[[], None], look_s: float, probe_s: float) -> None:
    """Call `emit` for ever, each time the engine has shown progress."""
    steps, proven = -1.0, time.monotonic()
    probe: asyncio.Task[None] | None = None
    while True:
        await asyncio.sleep(look_s)
        before, steps = steps, _steps()
        busy = engine.output_processor.has_unfinished_requests()
        if steps != before:
            proven = time.monotonic()
        elif probe is None and (busy or time.monotonic() - proven >= probe_s):
            # busy without a step that gave tokens: a long prompt, or a hang
            probe = asyncio.create_task(_probe(engine))
            await asyncio.wait([probe], timeout=look_s)
        if probe and probe.done():
            probe.exception()  # a refusal is an answer too
            probe, proven = None, time.monotonic()
        if probe is None or steps != before:
            emit()


def _steps() -> float:
    """Return how many steps the engine has made, by vLLM's metrics in this process."""
    from prometheus_client import REGISTRY

    metrics = REGISTRY.restricted_registry([_STEPS]).collect()
    return sum(sample.value for metric in metrics for sample in metric.samples if sample.name == _STEPS)


async def _probe(engine: Any) -> None:
    """Generate one token. An engine that hangs never returns from here."""
    if "generate" not in await engine.get_supported_tasks():
        return
    from vllm import SamplingParams

    one = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
    async for _ in engine.generate({"prompt_token_ids": canary.prompt(engine)}, one, request_id="probe"):
        pass
