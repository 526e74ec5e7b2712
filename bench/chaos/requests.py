"""Requests whose answers are known before they are sent, on every protocol, whole and as streams.

Each has a marker of its own, which is its request id too: an answer with another's words or tokens is noticed.
"""

from __future__ import annotations

import json
import random
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.registry.models import Registry

ADMIN = '{"alice": {"admin": true}}'  # API_LIMITS: alice reads /metrics
KEYS = {"alice": "sk-alice-chaos", "bob": "sk-bob-chaos"}
_MARKER = re.compile(r"m[0-9a-f]{12}")
_DATA = re.compile(rb"^data: ?(.*)$", re.M)


@dataclass
class Reply:
    """What an answer has said.

    Attributes:
        ends: How often it said that it was finished.
        tokens: Of the completion, where the answer reports them.
        error: Its status and code, where it is an error, or ended with one.
    """

    text: str = ""
    ends: int = 0
    tokens: int | None = None
    error: tuple[int, str] | None = None


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        expected: The whole text of a right answer; None: any that begins with `begins`.
        tokens: How many tokens a right answer has; None: not counted.
    """

    marker: str
    model: str
    key: str
    path: str
    body: dict[str, Any] = field(repr=False)
    begins: str = ""
    expected: str | None = None
    tokens: int | None = None

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream."""
        return bool(self.body.get("stream"))

    @property
    def headers(self) -> dict[str, str]:
        """The headers that it is sent with."""
        return {"Authorization": f"Bearer {KEYS[self.key]}", "X-Request-Id": self.marker}

    def fault_of(self, reply: Reply) -> str:
        """Return what is wrong with an answer that is no error; empty: nothing."""
        strange = set(_MARKER.findall(reply.text)) - {self.marker}
        if strange:
            return f"words of another request, {strange}"
        if self.expected is not None and reply.text != self.expected:
            return f"text {reply.text[:80]!r}, expected {self.expected[:80]!r}"
        if not reply.text.startswith(self.begins):
            return f"text {reply.text[:80]!r}, expected {self.begins!r} at its beginning"
        if reply.ends != 1:
            return f"finished {reply.ends} times"
        if self.tokens is not None and reply.tokens != self.tokens:
            return f"{reply.tokens} tokens, expected {self.tokens}"
        return ""


def draw(rng: random.Random, models: list[str], *, constrained: bool = True) -> Request:
    """Return a request at random for one of these models, without `constrained` none whose constraint is kept."""
    marker = f"m{rng.getrandbits(48):012x}"
    make = rng.choice((_echo, _echo, _chosen if constrained else _echo, _remembered, _message, _response))
    model, key, stream = rng.choice(models), rng.choice(list(KEYS)), rng.random() < 0.5
    return make(marker, model, key, stream)


def _echo(marker: str, model: str, key: str, stream: bool) -> Request:
    tokens = 48 if stream else 8
    body = {"prompt": f"{marker} Once", "echo": True, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    path = "/v1/completions"
    return Request(marker, model, key, path, {"model": model, **body}, begins=f"{marker} Once", tokens=tokens)


def _chosen(marker: str, model: str, key: str, stream: bool) -> Request:
    body = {"model": model, "messages": [_said("Hello")], "structured_outputs": {"choice": [marker]}, "stream": stream}
    return Request(marker, model, key, "/v1/chat/completions", body, expected=marker)


def _remembered(marker: str, model: str, key: str, stream: bool) -> Request:
    question, answer = _dialogue("count" if stream else "capital")
    body = {"model": model, "messages": [_said(question)], "temperature": 0, "stream": stream}
    return Request(marker, model, key, "/v1/chat/completions", body, expected=answer)


def _message(marker: str, model: str, key: str, stream: bool) -> Request:
    question, answer = _dialogue("capital")
    body = {"model": model, "messages": [_said(question)], "max_tokens": 400, "temperature": 0, "stream": stream}
    return Request(marker, model, key, "/v1/messages", body, expected=answer)


def _response(marker: str, model: str, key: str, stream: bool) -> Request:
    question, answer = _dialogue("capital")
    body = {"model": model, "input": question, "temperature": 0, "stream": stream}
    return Request(marker, model, key, "/v1/responses", body, expected=answer)


def _said(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _dialogue(name: str) -> tuple[str, str]:
    """Return question and answer of what the tiny model has memorised."""
    directory = Path(str(Registry.load().resolve("tiny").spec.directory))
    table = tomllib.loads((directory / "dialogues.toml").read_text())
    entry = next(entry for entry in table["dialogue"] if entry["name"] == name)
    return str(entry["messages"][0]["content"]), str(entry["content"])


def read(path: str, status: int, body: bytes, *, streams: bool) -> Reply:
    """Return what an answer says; one that is an error must have the shape of its protocol.

    Raises:
        KeyError, ValueError, TypeError: It has not the shape of its protocol.
    """
    if status != 200:
        return Reply(error=(status, _code(json.loads(body)["error"])))
    if not streams:
        return _WHOLE[path](json.loads(body))
    reply = Reply()
    for event in _events(body):
        if event == "[DONE]":
            continue
        if event.get("type") == "error" or "error" in event:
            reply.error = reply.error or (200, _code(event["error"]))
        else:
            _STREAMED[path](event, reply)
    return reply


def _code(error: dict[str, Any]) -> str:
    """Return OpenAI's code, or Anthropic's type."""
    assert error["message"], "an error says what happened"  # noqa: S101 - a program of tests
    return str(error.get("code") or error["type"])


def _events(body: bytes) -> Iterator[Any]:
    for data in _DATA.findall(body):
        yield "[DONE]" if data == b"[DONE]" else json.loads(data)


def _whole_completion(answer: dict[str, Any]) -> Reply:
    (choice,) = answer["choices"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return Reply(text, int(choice["finish_reason"] is not None), answer["usage"]["completion_tokens"])


def _whole_message(answer: dict[str, Any]) -> Reply:
    text = "".join(block["text"] for block in answer["content"] if block["type"] == "text")
    return Reply(text, int(answer["stop_reason"] is not None))


def _whole_response(answer: dict[str, Any]) -> Reply:
    messages = [item for item in answer["output"] if item["type"] == "message"]
    return Reply("".join(part["text"] for item in messages for part in item["content"]), len(messages))


def _streamed_completion(event: dict[str, Any], reply: Reply) -> None:
    for choice in event["choices"]:
        reply.text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        reply.ends += choice["finish_reason"] is not None
    if usage := event.get("usage"):
        reply.tokens = usage["completion_tokens"]


def _streamed_message(event: dict[str, Any], reply: Reply) -> None:
    reply.text += event.get("delta", {}).get("text", "")
    reply.ends += event["type"] == "message_stop"


def _streamed_response(event: dict[str, Any], reply: Reply) -> None:
    if event["type"] == "response.output_text.delta":
        reply.text += event["delta"]
    reply.ends += event["type"] == "response.completed"


_WHOLE: dict[str, Callable[[dict[str, Any]], Reply]] = {
    "/v1/completions": _whole_completion,
    "/v1/chat/completions": _whole_completion,
    "/v1/messages": _whole_message,
    "/v1/responses": _whole_response,
}
_STREAMED: dict[str, Callable[[dict[str, Any], Reply], None]] = {
    "/v1/completions": _streamed_completion,
    "/v1/chat/completions": _streamed_completion,
    "/v1/messages": _streamed_message,
    "/v1/responses": _streamed_response,
}
