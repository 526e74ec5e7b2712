"""The engine's heartbeat: emitted only while the engine can generate. The parent kills an engine without one.

An engine can hang with its port open and `/health` green. While requests run, the heartbeat is the progress of vLLM's
own counters; while none run, or no counter moves, it is a probe: one token that the engine has to generate. It runs in
the API server's own event loop, so a server that hangs emits none either. A model that cannot generate, such as an
embedding model, has no token to generate; its probe returns at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from vllm_service import canary

POLL_S = 5.0  # between two reads of the counters, at most
PROBE_S = 30.0  # between two probes of an idle engine, at most
_STEPS = "vllm:iteration_tokens_total_count"  # of a histogram: one observation per engine step that gave tokens


def intervals(hang_s: float) -> tuple[float, float]:
    """Return the seconds between reads and between probes, for a parent that waits `hang_s` for a heartbeat."""
    return min(POLL_S, hang_s / 4), min(PROBE_S, hang_s / 2)


async def run_heartbeat(engine: Any, emit: Callable[[], None], poll_s: float, probe_s: float) -> None:
    """Call `emit` at every read of the counters, unless none moved and a probe is unanswered. Never returns."""
    steps, progress_at = -1.0, time.monotonic()
    probe: asyncio.Task[None] | None = None
    while True:
        await asyncio.sleep(poll_s)
        before, steps = steps, _steps()
        busy = engine.output_processor.has_unfinished_requests()
        if steps != before:
            progress_at = time.monotonic()
        elif probe is None and (busy or time.monotonic() - progress_at >= probe_s):
            # busy, and no step gave tokens: a long prompt, or a hang
            probe = asyncio.create_task(_probe(engine))
            await asyncio.wait([probe], timeout=poll_s)
        if probe and probe.done():
            probe.exception()  # an engine that rejects the probe has answered, too
            probe, progress_at = None, time.monotonic()
        if probe is None or steps != before:
            emit()


def _steps() -> float:
    """Return how many steps gave tokens, by vLLM's metrics in this process."""
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
