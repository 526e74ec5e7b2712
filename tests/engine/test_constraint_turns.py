"""Clients take turns at having their constraints compiled, and what nobody waits for is not compiled: real engine."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from .guarded import KEYS, Guarded

MANY = 12  # constraints of one client, each of which takes its 2 s of processor time
WITHIN_S = 15  # of a client whose turn comes next, on a busy machine; all of the other's take twice as long


def costly(number: int) -> dict[str, Any]:
    """Return a schema that takes xgrammar minutes, another for each number."""
    choices = [
        {"type": "object", "properties": {f"{number}_{i}_{j}": {} for i in range(99)}, "minProperties": 1}
        for j in range(12)
    ]
    return {"anyOf": choices}


def body(**outputs: Any) -> dict[str, Any]:
    """Return the body of a request."""
    return {"model": "llm", "prompt": "Hello", "max_tokens": 4, "structured_outputs": outputs}


@pytest.fixture
def crowd(generating: Guarded) -> Iterator[list[http.client.HTTPConnection]]:
    """Connections of one client on which it waits for its constraints."""
    with contextlib.ExitStack() as stack:
        connections = []
        for number in range(MANY):
            connection = http.client.HTTPConnection("127.0.0.1", generating.port, timeout=120)
            stack.enter_context(contextlib.closing(connection))
            headers = {"Authorization": f"Bearer {KEYS[0]}", "Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body(json=costly(number))), headers)
            connections.append(connection)
        yield connections


def ask(engine: Guarded, key: str, **outputs: Any) -> float:
    """Send a constraint that costs nothing, and return the seconds until its answer."""
    begun = time.monotonic()
    headers = {"Authorization": f"Bearer {key}"}
    answer = requests.post(f"{engine.url}/v1/completions", json=body(**outputs), headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    return time.monotonic() - begun


def test_constraint_of_another_client_does_not_wait_for_all_of_one(
    generating: Guarded, crowd: list[http.client.HTTPConnection]
) -> None:
    """Its turn comes after the one at work."""
    assert ask(generating, KEYS[1], regex="[a-c]{2}") < WITHIN_S
    assert crowd[0].getresponse().status == 400


def test_constraints_of_a_client_that_left_are_not_compiled(
    generating: Guarded, crowd: list[http.client.HTTPConnection]
) -> None:
    """Not even the one at work. All of them take 24 s of processor time."""
    for connection in crowd:
        connection.close()
    assert ask(generating, KEYS[0], regex="[d-f]{2}") < WITHIN_S
