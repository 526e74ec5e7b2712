"""The stop between "built" and "listening": vLLM awaits this plugin after the engine is built and before it listens.

Here the engine answers its canary, a short greedy generation: an engine that loaded but cannot generate never gets a
port. Held at ASLEEP it then sleeps with no port and no key, and on release wakes and must give the same canary again.
"""

from __future__ import annotations

import asyncio
import os
from argparse import Namespace
from typing import Any

from vllm_service import control
from vllm_service.main import HOLD_VARIABLE

CANARY_TOKENS = 8
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
