"""Streams of the tiny model that are in flight while something happens to their service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import requests

from .dialogues import dialogue
from .running import Service

ENDLESS = {"n": 16, "max_tokens": 1900, "ignore_eos": True}  # 7.5 s on two quiet cores: longer than the drain's 6 s
LONGEST = {**ENDLESS, "n": 64}  # 30 s; the service needs LONGEST_SETTINGS
LONGEST_SETTINGS = {"SERVICE_MAX_N": "64"}


@contextmanager
def stream(service: Service, path: str = "/v1/chat/completions", **fields: object) -> Iterator[Iterator[str]]:
    """Open a stream and give its events, of which the first has come: it is in flight."""
    body = {"model": "llm", "stream": True, "prompt": "One two three", **dialogue("count").request, **fields}
    with requests.post(f"{service.url}{path}", json=body, stream=True, timeout=120) as answer:
        assert answer.status_code == 200, answer.text
        events = (line.decode().removeprefix("data: ") for line in answer.iter_lines() if line)
        while not content(next(events)):
            pass  # the role comes before the first word
        yield events


def content(event: str) -> str:
    """Return the words of an event of a chat, or of a completion."""
    choices = json.loads(event).get("choices", [])
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content") or "" for choice in choices)


def count_to_ninety(events: Iterator[str]) -> None:
    """Read the counting up to 90: what is left then fits the drain on a busy machine too."""
    said = ""
    while " 9" not in said[100:]:  # past 40
        said += content(next(events))


def check_whole(rest: list[str]) -> None:
    """Insist that this is how the counting ends."""
    assert rest[-1] == "[DONE]"
    assert "stop" in [choice["finish_reason"] for event in rest[:-1] for choice in json.loads(event)["choices"]]
    assert "".join(content(event) for event in rest[:-1]).endswith(dialogue("count").content[-20:])
