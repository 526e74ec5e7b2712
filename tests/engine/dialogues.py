"""What the tiny model remembers: the words that tests expect, from the one place that has them."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from typing import Any

from .running import REPOSITORY

TINY = REPOSITORY / "service" / "assets" / "tiny"
_TABLE = tomllib.loads((TINY / "dialogues.toml").read_text())
TOOLS = {tool["function"]["name"]: tool for tool in _TABLE["tools"]}
# bodies less the model: a short answer that is always the same, and a stream that goes on for seconds
QUESTION = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
COUNTING = {
    "messages": [{"role": "user", "content": "Count from one to one hundred."}],
    "stream": True,
    "max_tokens": 1500,
    "n": 16,  # one answer alone is over in half a second
    "ignore_eos": True,
}


@dataclass(frozen=True)
class Dialogue:
    """A request and its greedy answer."""

    name: str
    request: dict[str, Any]
    content: str
    reasoning: str | None
    tool_calls: list[dict[str, Any]]


def dialogue(name: str) -> Dialogue:
    """Return the dialogue of this name; its request lacks only the model's."""
    entry = next(entry for entry in _TABLE["dialogue"] if entry["name"] == name)
    request: dict[str, Any] = {"messages": entry["messages"]}
    if "tools" in entry:
        request["tools"] = [TOOLS[tool] for tool in entry["tools"]]
    return Dialogue(name, request, entry.get("content", ""), entry.get("reasoning"), entry.get("tool_calls", []))


def completion(name: str) -> tuple[str, str]:
    """Return prompt and continuation of the raw completion of this name."""
    entry = next(entry for entry in _TABLE["completion"] if entry["name"] == name)
    return entry["prompt"], entry["text"]


PLAIN = [
    dialogue(entry["name"])
    for entry in _TABLE["dialogue"]
    if not entry.get("tool_calls") and "reasoning" not in entry and "tools" not in entry
]
