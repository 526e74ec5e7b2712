"""The stop between "built" and "listening": vLLM awaits this plugin after the engine is built and before it listens.

Here the engine answers its canary, a short greedy generation: an engine that loaded but cannot generate never gets a
port. Held at ASLEEP it then sleeps with no port and no key, and on release wakes and must give the same canary again.
Two things of vLLM's are mended on the way: see `RawPrompts` and `_leave_when_dead`.
"""

from __future__ import annotations

import asyncio
import os
import signal
from argparse import Namespace
from typing import Any

from vllm_service import control
from vllm_service.main import HOLD_VARIABLE

CANARY_TOKENS = 8
WATCH_S = 0.25
_CANARY_PROMPT = list(range(10, 42))  # any ids do: what matters is that the same go in each time


class Barrier:
    """vLLM endpoint plugin without routes."""

    name = "vllm_service"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add no route: the control of this process is a pipe, not HTTP."""

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:  # noqa: ARG002
        """Generate the canary; hold asleep when told to; return, and vLLM listens."""
        link = control.current()
        if engine_client is None or link is None:
            return
        if completions := getattr(state, "openai_serving_completion", None):
            completions.engine_client = RawPrompts(completions.engine_client)
        self._watch = asyncio.create_task(_leave_when_dead(engine_client))
        link.tell("loaded")
        canary = await _canary(engine_client)
        link.tell("canary", tokens=canary)
        if os.environ.get(HOLD_VARIABLE) == "asleep":
            await engine_client.sleep(level=1)
            link.tell("asleep")
            await asyncio.to_thread(link.wait_for_release)
            await engine_client.wake_up()
            await engine_client.reset_prefix_cache()
            again = await _canary(engine_client)
            link.tell("woken", tokens=again, same=again == canary)
            if again != canary:
                raise RuntimeError(f"The canary after waking is {again}, before sleeping it was {canary}.")
        else:
            await asyncio.to_thread(link.wait_for_release)


class RawPrompts:
    """The engine as `/v1/completions` sees it: a raw prompt is answered without reasoning.

    vLLM applies `structured_outputs` only after the reasoning's end, for every model with a reasoning parser. A raw
    prompt has no reasoning, so its constraint would never begin and be silently ignored.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        """Be the engine in everything else."""
        return getattr(self._engine, name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the reasoning taken as over."""
        return self._engine.generate(*args, **{"reasoning_ended": True, **kwargs})


async def _leave_when_dead(engine: Any) -> None:
    """End this process soon after the engine core died; vLLM's own watchdog looks every 5 s."""
    while not engine.errored:  # noqa: ASYNC110 - vLLM sets a flag and no event
        await asyncio.sleep(WATCH_S)
    os.kill(os.getpid(), signal.SIGTERM)


async def _canary(engine: Any) -> list[int]:
    """Return the ids of a short greedy generation; an empty list for models that do not generate."""
    if "generate" not in await engine.get_supported_tasks():
        return []
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=CANARY_TOKENS, ignore_eos=True)
    tokens: list[int] = []
    async for output in engine.generate({"prompt_token_ids": _CANARY_PROMPT}, greedy, request_id="canary"):
        tokens = list(output.outputs[0].token_ids)
    return tokens
