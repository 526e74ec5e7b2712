"""The stop between "built" and "listening": vLLM awaits this plugin after the engine is built and before it listens.

Here the engine answers its canary, a short greedy generation: an engine that loaded but cannot generate never gets a
port. Held at ASLEEP it is warmed up first and then sleeps with no port and no key; on release it wakes and must give
the same canary again. From then on it has a pulse, and ends when the parent says `drain`.
Two things of vLLM's are mended on the way: see `RawPrompts` and `_leave_when_dead`.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import secrets
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from vllm_service import canary, drain, heartbeat, parent_pipe, warmup
from vllm_service.main import HANG_VARIABLE, HOLD_VARIABLE

WATCH_S = 0.25


class Barrier:
    """vLLM endpoint plugin without routes."""

    name = "vllm_service"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add no route: the control of this process is a pipe, not HTTP."""

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:  # noqa: ARG002
        """Generate the canary; hold asleep when told to; return, and vLLM listens."""
        link = parent_pipe.current()
        if engine_client is None or link is None:
            return
        if completions := getattr(state, "openai_serving_completion", None):
            completions.engine_client = RawPrompts(completions.engine_client)
        self._watch = asyncio.create_task(_leave_when_dead(engine_client))
        try:
            await _come_to_release(link, engine_client, state)
            await _renew_randomness(engine_client)
        except BaseException:
            self._watch.cancel()  # vLLM ends its core now: the reason is this exception, not that
            raise
        _drain_when_told(link)
        self._pulse = asyncio.create_task(
            heartbeat.beat(
                engine_client, lambda: link.tell("pulse"), *heartbeat.intervals(float(os.environ[HANG_VARIABLE]))
            )
        )
        link.tell("open")


async def _come_to_release(link: parent_pipe.Control, engine: Any, state: Any) -> None:
    """Show that the engine can generate, and wait for the parent's word, asleep or awake."""
    link.tell("loaded")
    if os.environ.get(HOLD_VARIABLE) == "asleep":
        await _sleep_and_wake(link, engine, state)
    else:
        said = await canary.sing(engine, with_logprobs=False)
        link.tell("canary", tokens=said.tokens)
        await _release(link)


async def _release(link: parent_pipe.Control) -> None:
    """Wait for the parent's word; in the loop, so that nothing keeps this process from ending."""
    released, loop = asyncio.Event(), asyncio.get_running_loop()
    link.when_released(lambda: loop.call_soon_threadsafe(released.set))
    await released.wait()


async def _sleep_and_wake(link: parent_pipe.Control, engine: Any, state: Any) -> None:
    """Warm up, sleep until the release, wake, and prove that it is the same engine.

    It is rehearsed first: an engine that cannot do that would boot cold at every restore.
    """
    link.tell("warmed", failures=await warmup.warm_up(engine, state))
    before = await canary.sing(engine, with_logprobs=True)
    await engine.sleep(level=1)
    if different := canary.difference(before, await _wake(engine)):
        raise RuntimeError(f"This engine does not wake as it fell asleep: {different}. Set SERVICE_SNAPSHOT=cpu.")
    link.tell("canary", tokens=before.tokens)
    await engine.sleep(level=1)
    gc.collect()
    gc.freeze()  # vLLM does both before it listens: 0.25 s that are better spent before a snapshot
    link.tell("asleep")
    await _release(link)
    after = await _wake(engine, lambda: link.tell("awake"))
    different = canary.difference(before, after)
    link.tell("woken", tokens=after.tokens, different=different)
    if different:
        raise RuntimeError(f"The canary after waking is not the one before sleeping: {different}.")


async def _wake(engine: Any, awake: Callable[[], None] = lambda: None) -> canary.Canary:
    """Wake the engine and return what it says then."""
    if await engine.wake_up() is False or await engine.reset_prefix_cache() is False:
        raise RuntimeError("The engine woke in part: not all of its memory is back.")
    awake()
    return await canary.sing(engine, with_logprobs=True)


async def _renew_randomness(engine: Any) -> None:
    """Give this replica a randomness of its own, unless the model's entry asks for a seed."""
    random.seed()
    if any(argument.partition("=")[0] == "--seed" for argument in sys.argv):
        return
    await engine.collective_rpc("renew_randomness", args=(secrets.randbits(31),))


def _drain_when_told(link: parent_pipe.Control) -> None:
    loop, jobs = asyncio.get_running_loop(), set()

    async def end(grace_s: float, cancel_s: float) -> None:
        link.tell("drained", cut=await drain.current().drain(grace_s, cancel_s))

    def begin(grace_s: float, cancel_s: float) -> None:
        jobs.add(loop.create_task(end(grace_s, cancel_s)))

    link.on_drain = lambda word: loop.call_soon_threadsafe(begin, word["grace_s"], word["cancel_s"])


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
