"""What the strategies promise, with the real engine: random lifecycles, fresh randomness, an end that clients hear."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import requests

from bench.lifecycles import Lifecycles
from service.engine.environment import EngineEnv
from service.registry.models import Registry
from service.replica.lifecycle import Replica
from service.replica.plan import Plan

from .dialogues import dialogue
from .running import Service, free_port, wait_until

Start = Callable[..., Service]
SEED = 20261121  # `make soak` takes another each time


@pytest.fixture
def lifecycles(engine_env_: EngineEnv) -> Lifecycles:
    """Lifecycles of the tiny model's engine."""
    return Lifecycles(random.Random(SEED))  # noqa: S311 - no secret


def test_engine_held_and_released_five_times_is_ready_and_leaves_nothing(lifecycles: Lifecycles) -> None:
    """At IMPORTED or ASLEEP: released it serves, and afterwards there is no process, socket or file of it."""
    assert [one for one in (lifecycles.hold_and_release() for _ in range(5)) if not one.good] == []


def test_engine_killed_at_random_five_times_is_reported_and_leaves_nothing(lifecycles: Lifecycles) -> None:
    """Whichever process, whenever: ready all the same, or a sentence that says what happened, and nothing is left."""
    assert [one for one in (lifecycles.kill_at_random() for _ in range(5)) if not one.good] == []


def test_two_replicas_give_different_random_answers(engine_env_: EngineEnv) -> None:
    """VLLM starts every engine with seed 0, and a snapshot freezes it: each replica gets a randomness of its own."""
    answers = [_random_answer(engine_env_, snapshot) for snapshot in ("cpu", "gpu")]
    assert answers[0] != answers[1]


def test_replica_of_an_entry_with_a_seed_keeps_it(engine_env_: EngineEnv) -> None:
    """Whoever writes --seed into an entry wants the same answers from every replica."""
    answers = [_random_answer(engine_env_, "cpu", extra_args=("--seed", "7")) for _ in range(2)]
    assert answers[0] == answers[1]


def _random_answer(env: EngineEnv, snapshot: Any, **fields: Any) -> str:
    """Return what a fresh replica makes of a prompt at a high temperature."""
    spec = Registry.load().specs["tiny"].model_copy(update=fields)
    replica = Replica(Plan(spec, "tiny", env.device, env.python, os.environ, snapshot=snapshot, port=free_port()))
    try:
        replica.prepare()
        replica.start()
        body = {"model": "llm", "prompt": "Once", "temperature": 2.0, "top_k": -1, "max_tokens": 40, "ignore_eos": True}
        url = f"http://127.0.0.1:{replica.plan.port}/v1/completions"
        return str(requests.post(url, json=body, timeout=60).json()["choices"][0]["text"])
    finally:
        replica.stop(0)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_stop_cuts_a_stream_with_an_error_event_and_refuses_new_requests(start: Start, path: str) -> None:
    """During the drain a new request gets 503 and when to come again; what outlives the drain ends with an error."""
    service = start("tiny").wait_ready()
    service.engine()
    body = {"model": "llm", "stream": True, "n": 16, "max_tokens": 1900, "ignore_eos": True, "prompt": "One two three"}
    body |= dialogue("count").request
    with requests.post(f"{service.url}{path}", json=body, stream=True, timeout=120) as answer:
        assert answer.status_code == 200, answer.text
        lines = answer.iter_lines()
        next(lines)
        refused: list[requests.Response] = []

        def ask() -> None:
            wait_until(lambda: "Stopping" in service.err, 10, service)
            while not refused or refused[-1].status_code == 200:
                short = {**body, "stream": False, "n": 1, "max_tokens": 1}
                refused.append(requests.post(f"{service.url}{path}", json=short, timeout=10))

        asker = threading.Thread(target=ask)
        asker.start()
        service.signal(signal.SIGINT)
        *_, error, done = [line.decode() for line in lines if line]
        asker.join(10)
    assert (refused[-1].status_code, refused[-1].headers["Retry-After"]) == (503, "5")
    assert done == "data: [DONE]"
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "service_unavailable"
    assert service.wait_ended(10) == 0
