"""The engine's heartbeat: tokens, or none. Each look is counted, so that "no heartbeat" means looked and found none."""

from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_service import heartbeat

POLL_S = 0.001
NEVER_S = 1000.0
LOOKS = 20  # what a test sees of "for ever"


class Engine:
    """An engine as the heartbeat sees it. Each look at `has_unfinished_requests` is counted, and may advance the scene.

    Args:
        busy: Whether requests run.
        on_look: Called with the number of each look.
        hangs: It never gives a token.
    """

    def __init__(self, *, busy: bool, on_look: Any = None, hangs: bool = False, tasks: tuple[str, ...] = ("generate",)):
        self.busy, self.hangs, self.tasks = busy, hangs, tasks
        self.looks = self.probes = 0
        self.probed, self.seen = asyncio.Event(), asyncio.Event()
        self._on_look = on_look or (lambda _: None)
        self.model_config = SimpleNamespace(get_vocab_size=lambda: 1024)
        self.output_processor = SimpleNamespace(has_unfinished_requests=self._look)

    def _look(self) -> bool:
        self.looks += 1
        self._on_look(self.looks)
        if self.looks >= LOOKS:
            self.seen.set()
        return self.busy

    async def get_supported_tasks(self) -> tuple[str, ...]:
        """Return what it can do."""
        return self.tasks

    async def generate(self, prompt: Any, params: Any, *, request_id: str) -> Any:
        """Give one token, or none for ever."""
        assert (params.max_tokens, request_id) == (1, "probe")
        assert prompt["prompt_token_ids"]
        self.probes += 1
        self.probed.set()
        if self.hangs:
            await asyncio.Event().wait()
        yield None


class Steps:
    """The counter of the engine's steps, in the place of vLLM's metrics."""

    def __init__(self) -> None:
        self.value = 0.0

    def __call__(self) -> float:
        """Read it."""
        return self.value


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Return the counter that the heartbeat reads."""
    counter = Steps()
    monkeypatch.setattr(heartbeat, "_steps", counter)
    return counter


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the parameters of vLLM, which is not installed here, be what they were called with."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))


def heartbeats(make: Any, until: str = "seen", probe_s: float = NEVER_S, after_s: float = 0.0) -> tuple[int, Engine]:
    """Run the heartbeat until the engine was looked at often enough; return how often it emitted, and the engine."""
    emitted: list[None] = []

    async def scene() -> Engine:
        engine: Engine = make()
        beating = asyncio.ensure_future(heartbeat.run_heartbeat(engine, lambda: emitted.append(None), POLL_S, probe_s))
        await asyncio.wait_for(getattr(engine, until).wait(), 20)
        await asyncio.sleep(after_s)
        beating.cancel()
        return engine

    engine = asyncio.run(scene())
    return len(emitted), engine


def test_heartbeat_of_a_busy_engine_that_makes_steps_is_emitted_at_each_look(steps: Steps) -> None:
    """While tokens are generated the engine is not probed."""

    def step(_: int) -> None:
        steps.value += 3

    count, engine = heartbeats(lambda: Engine(busy=True, on_look=step))

    assert count >= LOOKS - 1
    assert engine.probes == 0


def test_heartbeat_of_a_busy_engine_without_a_step_ends(steps: Steps) -> None:
    """Requests wait, no token comes, nor the one asked for: one heartbeat for the first look, and no more."""
    count, engine = heartbeats(lambda: Engine(busy=True, hangs=True))

    assert (count, engine.probes) == (1, 1)


def test_heartbeat_of_a_busy_engine_without_a_step_that_answers_goes_on(steps: Steps) -> None:
    """A long prompt is read in chunks, and vLLM counts no step that gave no token."""
    count, engine = heartbeats(lambda: Engine(busy=True))

    assert count >= LOOKS - 2
    assert engine.probes >= LOOKS - 2


def test_heartbeat_of_a_busy_engine_that_goes_on_comes_back(steps: Steps) -> None:
    """A long kernel compilation is no death, if the parent has the patience."""

    def step(look: int) -> None:
        if look == LOOKS // 2:
            steps.value += 1

    count, _ = heartbeats(lambda: Engine(busy=True, hangs=True, on_look=step))

    assert count == 2


def test_heartbeat_of_an_idle_engine_is_emitted_without_a_token_for_a_while(steps: Steps) -> None:
    """It was asked a moment ago."""
    count, engine = heartbeats(lambda: Engine(busy=False))

    assert count >= LOOKS - 1
    assert engine.probes == 0


def test_heartbeat_of_an_idle_engine_is_a_token_each_time_it_is_due(steps: Steps) -> None:
    """With no time between probes each heartbeat is one."""
    count, engine = heartbeats(lambda: Engine(busy=False), probe_s=0)

    assert engine.probes >= LOOKS - 2
    assert engine.probes <= count <= engine.probes + 1


def test_heartbeat_of_an_idle_engine_that_gives_no_token_ends(steps: Steps) -> None:
    """`/health` would still be green."""
    count, engine = heartbeats(lambda: Engine(busy=False, hangs=True), until="probed", probe_s=0, after_s=20 * POLL_S)

    assert (count, engine.probes) == (1, 1)  # the first look finds a counter that it did not know


def test_heartbeat_of_a_model_that_does_not_generate_asks_for_no_token(steps: Steps) -> None:
    """An embedding model is asked for nothing it cannot do; its server's loop is what emits."""
    count, engine = heartbeats(lambda: Engine(busy=False, tasks=("embed",)), probe_s=0)

    assert count >= LOOKS - 1
    assert engine.probes == 0


def test_heartbeat_counts_steps_by_the_histograms_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """One observation a step, summed over engines; buckets and sums are not counted."""
    name = "vllm:iteration_tokens_total_count"
    samples = [SimpleNamespace(name=name, value=2.0), SimpleNamespace(name=name, value=3.0)]
    samples += [SimpleNamespace(name="vllm:iteration_tokens_total_sum", value=900.0)]

    def restricted(names: list[str]) -> Any:
        assert names == [name]
        return SimpleNamespace(collect=lambda: [SimpleNamespace(samples=samples)])

    registry = SimpleNamespace(restricted_registry=restricted)
    monkeypatch.setitem(sys.modules, "prometheus_client", SimpleNamespace(REGISTRY=registry))

    assert heartbeat._steps() == 5.0
