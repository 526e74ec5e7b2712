"""Lists in bodies, sent to the real engine behind nothing but its guard, as on Modal's direct path."""

from __future__ import annotations

import json
import subprocess
import time
from typing import Any

import psutil
import pytest
import requests

from service.in_engine.vllm_service import request_lists

from .guarded import KEYS, Guarded

USER = {"role": "user", "content": "Count: one two three"}
RESPONSES, CHAT, MESSAGES = "/v1/responses", "/v1/chat/completions", "/v1/messages"
COMPLETIONS = "/v1/completions"
MANY = dict.fromkeys(map(str, range(1_000_000)), 1)  # 14 MB
CPU_S = 1.0
GROWTH = 64 * 1024 * 1024  # 10,000 items `{}` took 6.8 GB
LONGEST_ANSWER = 1024 * 1024
WITHIN_S = 15  # of one token, on a busy machine
TABLES = """
import json
from typing import get_args
from pydantic import TypeAdapter
from vllm.entrypoints.anthropic.protocol import AnthropicContentBlock, AnthropicMessage
from vllm.entrypoints.openai.responses.protocol import ResponseInputOutputItem

schema = TypeAdapter(ResponseInputOutputItem).json_schema()

def values(node):
    found = {node["const"]} if "const" in node else set(node.get("enum", ()))
    return found.union(*map(values, node.get("anyOf", ())))

def constants(node, field):
    node = schema["$defs"][node["$ref"].split("/")[-1]] if "$ref" in node else node
    inner = [constants(one, field) for one in (*node.get("anyOf", ()), *node.get("oneOf", ()))]
    return values(node.get("properties", {}).get(field, {})).union(*inner)

print(json.dumps([
    sorted(constants(schema, "type")), sorted(constants(schema, "role")),
    sorted(get_args(AnthropicMessage.model_fields["role"].annotation)),
    sorted(get_args(AnthropicContentBlock.model_fields["type"].annotation)),
]))
"""


def post(engine: Guarded, path: str, **fields: Any) -> requests.Response:
    """Post a body of these fields."""
    body = {"model": "llm", "max_output_tokens" if path == RESPONSES else "max_tokens": 1, **fields}
    return requests.post(f"{engine.url}{path}", json=body, headers=engine.headers, timeout=120)


def used(engine: Guarded) -> tuple[float, int]:
    """Return the API process's seconds of CPU and its bytes of memory."""
    process = psutil.Process(engine.pid)
    times = process.cpu_times()
    return times.user + times.system, process.memory_info().rss


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (RESPONSES, {"input": [{}] * 10_000}),
        (RESPONSES, {"input": [0] * 100_000}),
        (RESPONSES, {"input": [{"type": "x"}] * 10_000}),
        (RESPONSES, {"input": [{"role": "user"}] * 10_000}),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text"}] * 50_000}]}),
        (RESPONSES, {"input": [USER] * 100_000}),
        (RESPONSES, {"input": "hi", "tools": [{}] * 2_000}),
        (RESPONSES, {"input": "hi", "include": [0] * 100_000}),
        (CHAT, {"messages": [{}] * 100_000}),
        (CHAT, {"messages": [{"role": "user", "content": [0] * 100_000}]}),
        (MESSAGES, {"messages": [{}] * 100_000}),
        (CHAT, {"messages": [USER], "chat_template_kwargs": MANY}),
        (CHAT, {"messages": [{**USER, **MANY}]}),
        (CHAT, {"messages": [USER], "logit_bias": MANY}),
        (RESPONSES, {"input": "hi", "metadata": MANY}),
        (COMPLETIONS, {"prompt": "hi", **MANY}),
        (COMPLETIONS, {"prompt": [[1]] * 10_000}),
        (COMPLETIONS, {"prompt": ["hi"] * 65, "n": 16}),
    ],
    ids=[
        *("items empty", "items numbers", "items of no type", "items without content", "parts without text"),
        *("items too many", "tools empty", "include numbers", "messages empty", "parts numbers", "anthropic empty"),
        *("template names", "message names", "biases", "metadata", "unknown names", "prompts", "prompts times n"),
    ],
)
def test_bad_list_is_400_in_a_second_and_costs_no_memory(
    generating: Guarded, path: str, fields: dict[str, Any]
) -> None:
    """What the guard lets through for want of a field ends at the first such item; others are answered at once."""
    before_s, before = used(generating)
    began = time.monotonic()
    answer = post(generating, path, **fields)
    took_s = time.monotonic() - began
    after_s, after = used(generating)

    assert answer.status_code == 400, answer.text[:500]
    assert after_s - before_s < CPU_S, f"{after_s - before_s:.1f} s of CPU, {took_s:.1f} s in all"
    assert after - before < GROWTH
    assert len(answer.content) < LONGEST_ANSWER


def test_request_of_another_client_does_not_wait_for_a_long_list_of_prompts(generating: Guarded) -> None:
    """All of them take minutes; the engine has a share of them at a time."""
    many = {"model": "llm", "prompt": ["Count"] * 1024, "max_tokens": 1000, "ignore_eos": True, "stream": True}
    one = {"model": "llm", "prompt": "Count", "max_tokens": 1}
    alice, bob = ({"Authorization": f"Bearer {key}"} for key in KEYS[:2])
    url = f"{generating.url}{COMPLETIONS}"
    with requests.post(url, json=many, headers=alice, stream=True, timeout=120) as crowd:
        lines = crowd.iter_lines()
        assert any(lines)
        began = time.monotonic()
        answer = requests.post(url, json=one, headers=bob, timeout=120)
        assert answer.status_code == 200, answer.text
        assert time.monotonic() - began < WITHIN_S
        assert any(lines)


@pytest.mark.parametrize(("path", "field"), [(CHAT, "messages"), (RESPONSES, "input"), (MESSAGES, "messages")])
def test_long_conversation_is_served(generating: Guarded, path: str, field: str) -> None:
    """As many turns as the tiny model's context holds."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 100

    answer = post(generating, path, **{field: [*turns, USER]})

    assert answer.status_code == 200, answer.text[:500]


def test_types_and_roles_are_those_of_the_engine(engine_python: str) -> None:
    """A type that vLLM learns is to be let through, one that it drops is not."""
    done = subprocess.run([engine_python, "-c", TABLES], capture_output=True, text=True, timeout=120, check=True)
    tables = (
        request_lists.ITEM_TYPES, request_lists.ITEM_ROLES, request_lists.ANTHROPIC_ROLES, request_lists.BLOCK_TYPES
    )  # fmt: skip

    assert json.loads(done.stdout.splitlines()[-1]) == [sorted(table) for table in tables]
