"""What the strategies promise, with the real engine: holds, random lifecycles, fresh randomness."""

from __future__ import annotations

import os
import random
import socket
from dataclasses import dataclass
from typing import Any

import pytest
import requests

from bench.lifecycles import Lifecycles
from service.engine.args import EngineOptions, engine_command
from service.engine.environment import EngineEnv
from service.engine.process import EngineProcess, State
from service.in_engine.vllm_service.events import Event
from service.registry.models import Registry
from service.replica.plan import Snapshot

from .dialogues import TINY, dialogue
from .running import BOOT_S, free_port

SEED = 20261121  # `make soak` takes another each time, and runs 30 holds and 20 kills


@pytest.fixture
def lifecycles(engine_env_: EngineEnv) -> Lifecycles:
    """Lifecycles of the tiny model's engine."""
    return Lifecycles(random.Random(SEED))  # noqa: S311 - no secret


def test_replicas_held_and_released_are_ready_draw_other_random_numbers_and_leave_nothing(
    lifecycles: Lifecycles,
) -> None:
    """Released from either hold a replica serves, and afterwards there is no process, socket or file of it.

    vLLM starts every engine with seed 0, and a snapshot freezes it: each replica seeds its samplers anew.
    """
    answers: list[str] = []
    holds: tuple[Snapshot, ...] = ("cpu", "gpu")
    ended = [lifecycles.hold_and_release(hold, lambda port: answers.append(random_answer(port))) for hold in holds]
    assert [one for one in ended if not one.good] == []
    assert answers[0] != answers[1]


def test_engine_killed_at_random_three_times_is_reported_and_leaves_nothing(lifecycles: Lifecycles) -> None:
    """Whichever process, whenever: ready all the same, or a sentence that says what happened, and nothing is left."""
    assert [one for one in (lifecycles.kill_at_random() for _ in range(3)) if not one.good] == []


@dataclass(frozen=True)
class Seeded:
    """What was seen of an engine of a registry entry with `--seed`.

    Attributes:
        listened: Whether its port took connections in the hold.
        events: Fields of the events of its boot.
        random_answer: Its first answer, at a high temperature.
        greedy_answer: Its answer to the dialogue `capital`.
        ended: Its state after the stop.
    """

    listened: bool
    events: dict[Event, dict[str, Any]]
    random_answer: str
    greedy_answer: str
    ended: State


@pytest.fixture(scope="module")
def seeded(engine_env_: EngineEnv) -> tuple[Seeded, Seeded]:
    """Two engines of one entry with a seed, each held at ASLEEP and released."""
    return _seeded(engine_env_), _seeded(engine_env_)


def _seeded(env: EngineEnv) -> Seeded:
    spec = Registry.load().specs["tiny"].model_copy(update={"extra_args": ("--seed", "7")})
    port = free_port()
    options = EngineOptions(port=port)
    command = engine_command(spec, TINY, options, default_key="tiny", device=env.device, parent_env=os.environ)
    events: dict[Event, dict[str, Any]] = {}
    engine = EngineProcess(command, python=env.python, hold="asleep", on_event=events.__setitem__)
    engine.spawn()
    try:
        engine.wait_for(State.ASLEEP, BOOT_S)
        with socket.socket() as probe:
            listened = probe.connect_ex(("127.0.0.1", port)) == 0
        engine.release()
        engine.wait_for(State.READY, BOOT_S)
        drawn = random_answer(port)
        body = {"model": "llm", **dialogue("capital").request}
        answer = requests.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60)
        greedy = answer.json()["choices"][0]["message"]["content"]
    finally:
        engine.stop(5)
    return Seeded(listened, events, drawn, greedy, engine.state)


def test_engine_held_asleep_has_no_port_and_wakes_with_the_same_canary(seeded: tuple[Seeded, Seeded]) -> None:
    """Built, warmed and asleep without a listener; after the release it wakes, repeats its canary and serves."""
    for seen in seeded:
        assert not seen.listened
        assert seen.events[Event.WOKEN]["different"] is None
        assert seen.events[Event.WOKEN]["tokens"] == seen.events[Event.CANARY]["tokens"]
        assert seen.events[Event.CANARY]["tokens"]
        assert seen.greedy_answer == dialogue("capital").content
        assert seen.ended is State.STOPPED


def test_engines_of_an_entry_with_a_seed_keep_it(seeded: tuple[Seeded, Seeded]) -> None:
    """A user who writes --seed into an entry wants the same answers from every replica."""
    assert seeded[0].random_answer == seeded[1].random_answer


def random_answer(port: int) -> str:
    """Return what an engine makes of a prompt at a high temperature."""
    body = {"model": "llm", "prompt": "Once", "temperature": 2.0, "top_k": -1, "max_tokens": 40, "ignore_eos": True}
    answer = requests.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
    return str(answer.json()["choices"][0]["text"])
