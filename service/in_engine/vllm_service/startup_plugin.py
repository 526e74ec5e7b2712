"""Holds a built engine before it listens: vLLM awaits this endpoint plugin before it opens its port.

Meanwhile the engine generates its canary, a short greedy generation: an engine that loaded but cannot generate never
gets a port. Held at ASLEEP it is warmed up first and then sleeps with no port and no key; on release it wakes and must
generate the same canary again. From then on it emits a heartbeat, and drains when the parent sends `drain`.
It also changes vLLM in two places: see `RawPrompts` and `_exit_when_core_died`.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import secrets
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from vllm_service import (
    adapters,
    bad_requests,
    canary,
    client_shares,
    constraint_hooks,
    drain,
    end_signals,
    engine_errors,
    heartbeat,
    memory_ceiling,
    parent_pipe,
    request_usage,
    traces,
    warmup,
)
from vllm_service.events import Event
from vllm_service.main import HANG_VARIABLE, HOLD_VARIABLE

WATCH_S = 0.25  # between two looks at whether the engine core is alive


class StartupPlugin:
    """vLLM endpoint plugin without routes."""

    name = "vllm_service"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add no route: this process is controlled by a pipe, not over HTTP."""

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:  # noqa: ARG002
        """Generate the canary; hold asleep if configured; when this returns, vLLM listens."""
        pipe = parent_pipe.current()
        if engine_client is None or pipe is None:
            return
        if completions := getattr(state, "openai_serving_completion", None):
            completions.engine_client = RawPrompts(completions.engine_client)
        engine_errors.watch(engine_client)
        bad_requests.shorten_log()
        self._watch = asyncio.create_task(_exit_when_core_died(engine_client))
        try:
            await _generate_and_hold(pipe, engine_client, state)
            await _renew_randomness(engine_client)
            self._enable(pipe, engine_client, state)
        except BaseException:
            self._watch.cancel()  # vLLM now ends its core; the failure to report is this exception
            raise

    def _enable(self, pipe: parent_pipe.ParentPipe, engine: Any, state: Any) -> None:
        """Set up what requests need, and what the parent watches and commands."""
        client_shares.enable(engine)
        request_usage.enable(engine)
        traces.enable(engine, pipe.release["traces"], pipe.release["replica"])
        constraint_hooks.enable(engine)  # not earlier: a snapshot holds no process of its own
        _end_on_command(pipe)
        _load_adapters_on_command(pipe, engine, state)
        poll_s, probe_s = heartbeat.intervals(float(os.environ[HANG_VARIABLE]))
        self._heartbeat = asyncio.create_task(
            heartbeat.run_heartbeat(engine, lambda: pipe.emit(Event.HEARTBEAT), poll_s, probe_s)
        )
        state.max_model_len = engine.model_config.max_model_len  # the guard adds it to /health
        memory_ceiling.limit_growth(pipe.release["growth_bytes"])
        memory_ceiling.limit_children(pipe.release["core_growth_bytes"])
        pipe.emit(Event.OPENING, max_model_len=state.max_model_len)


async def _generate_and_hold(pipe: parent_pipe.ParentPipe, engine: Any, state: Any) -> None:
    """Show that the engine can generate, and wait for the parent's release, asleep or awake."""
    pipe.emit(Event.LOADED)
    if os.environ.get(HOLD_VARIABLE) == "asleep":
        await _sleep_and_wake(pipe, engine, state)
    else:
        generated = await canary.generate_canary(engine, with_logprobs=False)
        pipe.emit(Event.CANARY, tokens=generated.tokens)
        await _release(pipe)


async def _release(pipe: parent_pipe.ParentPipe) -> None:
    """Wait for the parent's release in the event loop, so that a signal can still end this process."""
    released, loop = asyncio.Event(), asyncio.get_running_loop()
    pipe.when_released(lambda: loop.call_soon_threadsafe(released.set))
    await released.wait()


async def _sleep_and_wake(pipe: parent_pipe.ParentPipe, engine: Any, state: Any) -> None:
    """Warm up, sleep until the release, wake, and compare the canaries.

    It sleeps and wakes once before the release: an engine that cannot would boot cold after every restore.
    """
    pipe.emit(Event.WARMED, failures=await warmup.warm_up(engine, state))
    before = await canary.generate_canary(engine, with_logprobs=True)
    await engine.sleep(level=1)
    if different := canary.compare(before, await _wake(engine)):
        raise RuntimeError(
            f"The canary after a trial of sleep and wake differs: {different}. Set SERVICE_SNAPSHOT=cpu."
        )
    pipe.emit(Event.CANARY, tokens=before.tokens)
    await engine.sleep(level=1)
    gc.collect()
    gc.freeze()  # vLLM does both before it listens; here the 0.25 s come before the snapshot, not after every restore
    pipe.emit(Event.ASLEEP)
    await _release(pipe)
    after = await _wake(engine, lambda: pipe.emit(Event.AWAKE))
    different = canary.compare(before, after)
    pipe.emit(Event.WOKEN, tokens=after.tokens, different=different)
    if different:
        raise RuntimeError(f"The canary after waking is not the one before sleeping: {different}.")


async def _wake(engine: Any, on_awake: Callable[[], None] = lambda: None) -> canary.Canary:
    """Wake the engine and return the canary that it generates then."""
    if await engine.wake_up() is False or await engine.reset_prefix_cache() is False:
        raise RuntimeError("The engine woke without all of its memory: wake_up or reset_prefix_cache returned False.")
    on_awake()
    return await canary.generate_canary(engine, with_logprobs=True)


async def _renew_randomness(engine: Any) -> None:
    """Reseed, so that replicas restored from one snapshot differ; not where the registry entry sets a seed."""
    random.seed()
    if any(argument.partition("=")[0] == "--seed" for argument in sys.argv):
        return
    await engine.collective_rpc("renew_randomness", args=(secrets.randbits(31),))


def _end_on_command(pipe: parent_pipe.ParentPipe) -> None:
    loop, tasks = asyncio.get_running_loop(), set()

    async def end(grace_s: float, cancel_s: float) -> None:
        pipe.emit(Event.DRAINED, cancelled=await drain.current().drain(grace_s, cancel_s))

    def begin(grace_s: float, cancel_s: float) -> None:
        tasks.add(loop.create_task(end(grace_s, cancel_s)))

    pipe.on_drain = lambda command: loop.call_soon_threadsafe(begin, command["grace_s"], command["cancel_s"])
    end_signals.look_at_no_ports()
    pipe.on_terminate = lambda: loop.call_soon_threadsafe(end_signals.end)


def _load_adapters_on_command(pipe: parent_pipe.ParentPipe, engine: Any, state: Any) -> None:
    loop, tasks = asyncio.get_running_loop(), set()
    models = state.openai_serving_models
    loaded = adapters.Adapters(engine, models, models.base_model_paths[0].name)

    def begin(command: parent_pipe.Command) -> None:
        task = loop.create_task(loaded.carry_out(command, lambda **outcome: pipe.emit(Event.ADAPTER, **outcome)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    pipe.on_adapter = lambda command: loop.call_soon_threadsafe(begin, command)


class RawPrompts:
    """The engine as `/v1/completions` sees it: a raw prompt is answered without reasoning.

    vLLM applies `structured_outputs` only after the reasoning's end, for every model with a reasoning parser. A raw
    prompt has no reasoning, so its constraint would never begin and be silently ignored.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        """Forward everything else to the engine."""
        return getattr(self._engine, name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as if the reasoning were over."""
        return self._engine.generate(*args, **{"reasoning_ended": True, **kwargs})


async def _exit_when_core_died(engine: Any) -> None:
    """End this process soon after the engine core died; vLLM's own watchdog polls every 5 s."""
    while not engine.errored:  # noqa: ASYNC110 - vLLM sets a flag and no event
        await asyncio.sleep(WATCH_S)
    end_signals.end()
