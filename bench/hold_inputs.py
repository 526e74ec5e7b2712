"""What one API client can send at its worst: each input at its limit, or far beyond it, for `bench.hold`."""

from __future__ import annotations

import itertools
import json
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from service.in_engine.vllm_service.http_contract import BODY_LIMIT, MIB, TEXT_BODY_LIMIT
from service.in_engine.vllm_service.request_counts import OTHER_VALUES, TEXTS, VALUES
from service.in_engine.vllm_service.request_lists import ITEMS
from tests.engine.images import png

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
USER = {"role": "user", "content": "Hello"}
_TURNS = [{"role": "user", "content": [{"type": "text", "text": "a"}] * 5}] * ITEMS  # as many parts as the bound
_BACKTRACKING = "(a|b|ab|ba){0,1000}"


@dataclass(frozen=True)
class Input:
    """One kind of request, sent in a loop.

    Attributes:
        body: Returns the next body; several differ, so that no verdict is remembered.
        leaves: The client closes each connection after this many seconds; None: it reads the answer.
        sent: Bytes of the body that are sent before it waits; None: all.
        connections: At a time.
    """

    name: str
    path: str
    body: Callable[[], bytes]
    leaves: float | None = None
    sent: int | None = None
    connections: int = 4


def _same(name: str, path: str, fields: dict[str, Any], **options: Any) -> Input:
    body = json.dumps(
        {"model": "llm", "max_output_tokens" if path == RESPONSES else "max_tokens": 1, **fields}
    ).encode()
    return Input(name, path, lambda: body, **options)


def _numbered(name: str, fields: Callable[[int], dict[str, Any]], path: str = COMPLETIONS, **options: Any) -> Input:
    numbers = itertools.count()

    def body() -> bytes:
        begun = {"input": "a", "max_output_tokens": 1} if path == RESPONSES else {"prompt": "a", "max_tokens": 1}
        return json.dumps({"model": "llm", **begun, **fields(next(numbers))}).encode()

    return Input(name, path, body, **options)


def _text(size: int) -> str:
    rng = random.Random(1)  # noqa: S311 - no secret
    words = ("".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 9))) for _ in itertools.count())
    return " ".join(itertools.islice(words, size // 6))[:size]


def _names(count: int) -> dict[str, int]:
    return {str(number): 1 for number in range(count)}


def _costly_schema(number: int) -> dict[str, Any]:
    return {"structured_outputs": {"json": _schema(number)}}


def _costly_tool(number: int) -> dict[str, Any]:
    tool = {"type": "function", "name": "f", "strict": True, "parameters": _schema(number), "function": {"x": 1}}
    return {"tools": [tool], "tool_choice": {"type": "function", "name": "f"}}


def _schema(number: int) -> dict[str, Any]:
    choices = [
        {"type": "object", "properties": {f"{number}_{i}_{j}": {} for i in range(99)}, "minProperties": 1}
        for j in range(12)
    ]
    return {"anyOf": choices}


def inputs() -> Iterator[Input]:
    """Yield all of them."""
    long = _text(BODY_LIMIT - 1024)
    yield _same("items that are empty objects", RESPONSES, {"input": [{}] * 10_000})
    yield _same("items that are numbers", RESPONSES, {"input": [0] * 100_000})
    yield _same("items that lack their content", RESPONSES, {"input": [{"role": "user"}] * ITEMS})
    yield _same("10,000 items of five parts", RESPONSES, {"input": _parts("input_text")})
    yield _same("10,000 messages of five parts", CHAT, {"messages": _TURNS})
    yield _same("10,000 of Anthropic's messages of five parts", MESSAGES, {"messages": _TURNS})
    yield _same("1,024 prompts of 1,000 tokens", COMPLETIONS, {"prompt": ["a"] * TEXTS[COMPLETIONS]["prompt"], **_LONG})
    yield _same("16 answers of 1,000 tokens", COMPLETIONS, {"prompt": "a", "n": 16, **_LONG}, connections=16)
    yield _same("32 MiB of text", CHAT, {"messages": [{"role": "user", "content": long}]})
    yield _same("32 MiB of text, Anthropic", MESSAGES, {"messages": [{"role": "user", "content": long}]})
    yield _same("tokens without end", COMPLETIONS, {"prompt": [1] * (BODY_LIMIT // 3 - 1024)})
    yield _same("text to tokenize", "/tokenize", {"prompt": _text(TEXT_BODY_LIMIT - 1024)})
    yield _same("names in template arguments", CHAT, {"messages": [USER], "chat_template_kwargs": _NAMES})
    yield _same("names in metadata", RESPONSES, {"input": "a", "metadata": _names(1_000_000)})
    yield _same("names in a message", CHAT, {"messages": [{**USER, **_names(VALUES - 1000)}]})
    yield _same("empty objects in an unknown field", CHAT, {"messages": [USER], "x": [{}] * 8_000_000})
    yield _same("2,000 tools that lack their name", RESPONSES, {"input": "a", "tools": [{"type": "function"}] * 2000})
    yield _same("integers of 70 bits", CHAT, {"messages": [USER], "top_k": 2**70, "thinking_token_budget": 2**70})
    yield _same("an endless grammar", COMPLETIONS, {"prompt": "a", "structured_outputs": {"grammar": "root ::= root"}})
    yield _same("images of 31 MiB", CHAT, {"messages": [{"role": "user", "content": [_image(31 * MIB)]}]})
    yield _same("the largest images", CHAT, {"messages": [{"role": "user", "content": [_IMAGE, _IMAGE]}]})
    yield _numbered("schemas that take minutes", _costly_schema)
    yield _numbered("schemas of tools that take minutes, beside a function", _costly_tool, RESPONSES)
    yield _numbered("slow expressions", _slow, connections=64)
    yield _numbered("slow expressions, client gone", _slow, leaves=0.3, connections=64)
    yield _same("bodies without their end", CHAT, {"messages": [{"role": "user", "content": long}]}, sent=31 * MIB)
    yield _same(
        "streams, client gone", COMPLETIONS, {"prompt": "a", "stream": True, **_LONG}, leaves=0.3, connections=64
    )


def _image(size: int) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * size}}


_IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(8192, 8192)}"}}
_LONG = {"max_tokens": 1000, "ignore_eos": True}
_NAMES = _names(OTHER_VALUES - 1000)


def _parts(kind: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": kind, "text": "a"}] * 5}] * ITEMS


def _slow(number: int) -> dict[str, Any]:
    return {"structured_outputs": {"regex": f"{number}{_BACKTRACKING}"}}
