"""The tools of real MCP servers, offered as agents offer them: through gateway and real engine."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
import requests

from bench.schemas import mcp
from service.engine import environment
from tests.engine.running import Service

from . import client_env
from .clients import KEY

USER = [{"role": "user", "content": "Hello!"}]
ODD = {
    "name": "odd",
    "inputSchema": {"type": "object", "properties": {"text": {"type": "string", "pattern": r"\bfoo\b"}}},
}
STEP = 4  # of a server's tools that are forced, every fourth
VALIDATE = """
import json, sys
from jsonschema import Draft202012Validator
for schema, text in json.load(sys.stdin):
    Draft202012Validator(schema).validate(json.loads(text))
"""


@pytest.fixture(scope="module", params=sorted(mcp.SERVERS))
def tools(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The tools of a server."""
    return mcp.tools(client_env.mcp_servers(), request.param)


def post(service: Service, path: str, **fields: Any) -> requests.Response:
    """Send a request."""
    headers = {"Authorization": f"Bearer {KEY}"}
    return requests.post(f"{service.url}{path}", json={"model": "agents", **fields}, headers=headers, timeout=120)


def functions(tools: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    """Return tools as OpenAI's API writes them."""
    return [
        {"name": tool["name"], "description": tool.get("description", ""), "parameters": tool["inputSchema"], **more}
        for tool in tools
    ]


def test_mcp_tools_are_offered_all_at_once_on_each_protocol(
    agents_service: Service, tools: list[dict[str, Any]]
) -> None:
    """One that no backend can compile among them leaves the others as they are."""
    offered = [*tools, ODD]
    chat = [{"type": "function", "function": function} for function in functions(offered)]
    responses = [{"type": "function", **function} for function in functions(offered)]
    messages = [{"name": tool["name"], "input_schema": tool["inputSchema"]} for tool in offered]
    answers = [
        post(agents_service, "/v1/chat/completions", messages=USER, tools=chat, max_tokens=16),
        post(agents_service, "/v1/responses", input="Hello!", tools=responses, max_output_tokens=16),
        post(agents_service, "/v1/messages", messages=USER, tools=messages, max_tokens=16),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 200], [answer.text for answer in answers]


def test_mcp_tools_beside_an_odd_strict_one_are_refused_with_its_name_and_place(
    agents_service: Service, tools: list[dict[str, Any]]
) -> None:
    """Among a server's tools it would else be looked for in vain."""
    offered = [{"type": "function", "function": function} for function in functions([*tools, ODD], strict=True)]
    answer = post(agents_service, "/v1/chat/completions", messages=USER, tools=offered, max_tokens=16)
    assert answer.status_code == 400
    assert "tool 'odd'" in answer.json()["error"]["message"]
    assert "#/properties/text/pattern" in answer.json()["error"]["message"]


def test_mcp_tools_that_are_strict_and_forced_get_arguments_that_fit(
    agents_service: Service, tools: list[dict[str, Any]]
) -> None:
    """A call that is cut, since a tiny model fills a string without end, is no whole JSON and is not looked at."""
    calls = []
    for function in functions(tools[::STEP], strict=True):
        fields = {"tools": [{"type": "function", "function": function}], "parallel_tool_calls": False}
        answer = post(
            agents_service, "/v1/chat/completions", messages=USER, tool_choice="required", max_tokens=100, **fields
        )
        assert answer.ok, answer.text
        choice = answer.json()["choices"][0]
        if choice["finish_reason"] != "length":
            (call,) = choice["message"]["tool_calls"]
            calls.append((function["parameters"], call["function"]["arguments"]))
    command = [environment.ensure().python, "-c", VALIDATE]
    subprocess.run(command, input=json.dumps(calls), text=True, check=True)
