"""Bodies as the gateway forwards them, parsed by vLLM's own request models and its server's JSON parser."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from typing import Any

import pytest

from service.engine import environment
from service.gateway import request_fields
from service.in_engine.vllm_service.overrides import with_overrides

CHANGES: dict[str, str | float] = {"model": "qwen3-8b", "temperature": 0.3, "tool_choice": "auto"}
TOOL = {"name": "f", "parameters": {"type": "object"}}
MESSAGES = [{"role": "user", "content": "Hi }"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "tools": [{"type": "function", "function": TOOL}]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi", "tools": [{"type": "function", **TOOL}]},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 9},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1, 2]},
}
PROGRAM = """
import asyncio, base64, json, sys
from fastapi import FastAPI
from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.engine.protocol import _REMOVED_GUIDED_FIELDS
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeRequest

app, models = FastAPI(), {
    "/v1/chat/completions": ChatCompletionRequest, "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest, "/v1/messages": AnthropicMessagesRequest,
    "/v1/messages/count_tokens": AnthropicCountTokensRequest,
    "/tokenize": TokenizeRequest, "/detokenize": DetokenizeRequest,
}
for path, model in models.items():
    def answer(request: model):
        return {"model": request.model, "temperature": getattr(request, "temperature", None),
                "tool_choice": getattr(request, "tool_choice", None)}
    answer.__annotations__["request"] = model
    app.post(path)(answer)

async def ask(path, body):
    sent = []
    async def receive():
        return {"type": "http.request", "body": body}
    async def send(message):
        sent.append(message)
    await app({"type": "http", "method": "POST", "path": path, "query_string": b"", "asgi": {"version": "3.0"},
               "headers": [(b"content-type", b"application/json")]}, receive, send)
    return [sent[0]["status"], json.loads(sent[1]["body"])]

asked = json.load(sys.stdin)
answers = [asyncio.run(ask(path, base64.b64decode(body))) for path, body in asked]
print(json.dumps({"answers": answers, "removed": sorted(_REMOVED_GUIDED_FIELDS)}))
"""


@pytest.fixture(scope="module")
def read() -> Any:
    """What vLLM reads of every body: all in one process, for its imports take seconds."""
    asked = [(path, base64.b64encode(body).decode()) for path, body in every_body()]
    env = {"PATH": os.defpath, "VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1", "HOME": os.environ["HOME"]}
    done = subprocess.run(
        [environment.ensure().python, "-c", PROGRAM],
        env=env,
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def every_body() -> list[tuple[str, bytes]]:
    """Return each route's body with each way to set the fields before the gateway sets them anew."""
    found = []
    for path, fields in BODIES.items():
        for given in ('"model":"old","temperature":1.5,', '"mod\\u0065l":"old","temper\\u0061ture":0,', ""):
            body = bytearray(f"{{{given}{json.dumps(fields)[1:]} \r\n".encode())
            changes = {name: CHANGES[name] for name in CHANGES if name != "tool_choice" or "tools" in fields}
            first, second = with_overrides(body, changes)
            found.append((path, bytes(first) + second))
    return found


def test_fields_that_the_gateway_sets_win_on_every_route(read: Any) -> None:
    """The last of a name counts, from the socket to the request model."""
    for (path, body), (status, answer) in zip(every_body(), read["answers"], strict=True):
        assert status == 200, (path, answer)
        assert answer["model"] == CHANGES["model"], body
        if path.startswith("/v1/") and "count_tokens" not in path:
            assert answer["temperature"] == CHANGES["temperature"], body
        if "tools" in BODIES[path]:
            assert answer["tool_choice"] == CHANGES["tool_choice"], body


def test_removed_fields_are_those_that_vllm_ignores(read: Any) -> None:
    """Another version may ignore others."""
    assert sorted(request_fields.REMOVED_FIELDS) == read["removed"]
