"""Requests without tools: which fields the guard overrides, and which choice cannot be met."""

from __future__ import annotations

import json
from typing import Any

import pytest
from vllm_service.api_error import APIError
from vllm_service.request_lists import check

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
TOOL = {"type": "function", "function": {"name": "f"}}
ABSENT = object()


def overrides(path: str, **fields: Any) -> Any:
    """Return what is overridden in a body of these fields."""
    return check(path, json.dumps({name: value for name, value in fields.items() if value is not ABSENT}).encode())


@pytest.mark.parametrize("tools", [[], None, ABSENT])
@pytest.mark.parametrize("choice", ["auto", "none", None, ABSENT])
def test_request_without_tools_is_overridden_with_what_vllm_takes(tools: object, choice: object) -> None:
    """Only what the request sets: the rest is absent already."""
    chat = {"tools": None} if tools is not ABSENT else {}
    responses: dict[str, object] = {"tools": []} if tools is not ABSENT else {}
    if choice is not ABSENT:
        chat, responses = chat | {"tool_choice": None}, responses | {"tool_choice": "auto"}

    assert overrides(CHAT, tools=tools, tool_choice=choice) == chat
    assert overrides(RESPONSES, tools=tools, tool_choice=choice) == responses
    assert overrides("/tokenize", tools=tools, tool_choice=choice) == {}


@pytest.mark.parametrize("tools", [[], None, ABSENT])
@pytest.mark.parametrize(
    ("path", "choice"),
    [
        (CHAT, "required"),
        (CHAT, TOOL),
        (RESPONSES, "required"),
        (RESPONSES, {"type": "function", "name": "f"}),
        (MESSAGES, {"type": "any"}),
        (MESSAGES, {"type": "tool", "name": "f"}),
    ],
)
def test_request_without_tools_that_demands_a_call_is_refused(path: str, choice: object, tools: object) -> None:
    """As OpenAI and Anthropic do; the error names the field."""
    with pytest.raises(APIError, match="the request has no tools") as caught:
        overrides(path, tools=tools, tool_choice=choice)

    assert (caught.value.status, caught.value.param) == (400, "tool_choice")


@pytest.mark.parametrize("choice", ["auto", "none", "required", TOOL, None, ABSENT])
@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_request_with_tools_is_not_changed(path: str, choice: object) -> None:
    """Whatever its choice."""
    assert overrides(path, tools=[TOOL], tool_choice=choice) == {}


@pytest.mark.parametrize("choice", [1, [], True, {"type": "auto"}])
def test_request_without_tools_and_a_choice_of_another_kind_is_vllms_to_judge(choice: object) -> None:
    """It says what is wrong with it, or takes it."""
    assert overrides(MESSAGES, tools=[], tool_choice=choice) == {}
