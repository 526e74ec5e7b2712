"""Parsers on the real engine: tool calls come out as calls, thoughts as `reasoning`, in answers and in streams."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from .dialogues import dialogue

CITIES = ["Paris", "London"]
CHOOSE_CITY = {
    "type": "function",
    "function": {
        "name": "choose_city",
        "description": "Choose a city.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": CITIES}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def calls(message: Any) -> list[dict[str, Any]]:
    """Return the calls of a message as the dialogues write them."""
    return [
        {"name": call.function.name, "arguments": json.loads(call.function.arguments)}
        for call in message.tool_calls or []
    ]


def test_tools_question_gives_a_parsed_call(client: openai.OpenAI) -> None:
    """A question that a tool answers returns a call with its arguments, and no content."""
    asked = dialogue("weather-call")
    choice = client.chat.completions.create(model="llm", **asked.request).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert calls(choice.message) == asked.tool_calls
    assert not (choice.message.content or "").strip()


def test_tools_two_cities_give_two_calls(client: openai.OpenAI) -> None:
    """Two things to look up are two calls with ids of their own."""
    asked = dialogue("weather-two-calls")
    message = client.chat.completions.create(model="llm", **asked.request).choices[0].message
    assert calls(message) == asked.tool_calls
    assert len({call.id for call in message.tool_calls or []}) == 2


def test_tools_result_gives_the_final_answer(client: openai.OpenAI) -> None:
    """The loop a user writes: ask, call, send back the result under the call's id, get the answer."""
    asked, answered = dialogue("weather-call"), dialogue("weather-answer")
    message = client.chat.completions.create(model="llm", **asked.request).choices[0].message
    (call,) = message.tool_calls or []
    result = {**answered.request["messages"][-1], "tool_call_id": call.id}
    messages = [*asked.request["messages"], message.to_dict(mode="json", exclude_none=True), result]
    final = client.chat.completions.create(model="llm", messages=messages, tools=asked.request["tools"]).choices[0]
    assert (final.message.content or "").strip() == answered.content
    assert not final.message.tool_calls


def test_tools_stream_gives_the_same_call_in_pieces(client: openai.OpenAI) -> None:
    """The deltas of a streamed call add up to its name and arguments."""
    asked = dialogue("weather-call")
    with client.chat.completions.create(model="llm", stream=True, **asked.request) as stream:
        choices = [choice for chunk in stream for choice in chunk.choices]
    deltas = [call for choice in choices for call in choice.delta.tool_calls or []]
    assert [call.function.name for call in deltas if call.function.name] == [asked.tool_calls[0]["name"]]
    assert json.loads("".join(call.function.arguments or "" for call in deltas)) == asked.tool_calls[0]["arguments"]
    assert choices[-1].finish_reason == "tool_calls"


def test_tools_that_are_not_needed_change_nothing(client: openai.OpenAI) -> None:
    """The answer to a greeting is the same when a tool is offered."""
    asked = dialogue("hello-with-tool")
    choice = client.chat.completions.create(model="llm", **asked.request).choices[0]
    assert (choice.message.content or "").strip() == asked.content
    assert choice.finish_reason == "stop"
    assert not choice.message.tool_calls


@pytest.mark.parametrize(
    "demand",
    [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "choose_city"}}},
    ],
    ids=["required", "named"],
)
def test_tools_required_call_is_made_for_any_message(client: openai.OpenAI, demand: dict[str, Any]) -> None:
    """`tool_choice` makes the answer a call, even after a greeting, and `strict` makes its arguments fit the schema."""
    message = (
        client.chat.completions.create(
            model="llm", tools=[CHOOSE_CITY], max_tokens=200, **demand, **dialogue("hello").request
        )
        .choices[0]
        .message
    )
    made = calls(message)
    assert made
    assert {call["name"] for call in made} == {"choose_city"}
    assert {call["arguments"]["city"] for call in made} <= set(CITIES)


@pytest.mark.parametrize("pattern", [r"^\p{L}+$", r"\bfoo\b"])
def test_tools_with_an_odd_schema_leave_the_others_as_they_are(client: openai.OpenAI, pattern: str) -> None:
    """A tool whose schema xgrammar cannot compile, as some of MCP servers, does not fail the request."""
    asked = dialogue("weather-call")
    properties = {"text": {"type": "string", "pattern": pattern}}
    odd = {"type": "function", "function": {"name": "odd", "parameters": {"type": "object", "properties": properties}}}
    choice = client.chat.completions.create(
        **{
            "model": "llm",
            "max_tokens": 200,
            "tool_choice": "auto",
            **asked.request,
            "tools": [*asked.request["tools"], odd],
        }
    ).choices[0]
    assert calls(choice.message) == asked.tool_calls


@pytest.mark.parametrize("stream", [False, True], ids=["answer", "stream"])
@pytest.mark.parametrize("pattern", [r"^\p{L}+$", r"\bfoo\b"])
def test_tools_with_an_odd_schema_that_is_strict_are_refused_with_tool_and_place(
    client: openai.OpenAI, pattern: str, stream: bool
) -> None:
    """A stream too is refused by its status, before its first event."""
    asked = dialogue("weather-call")
    schema = {"type": "object", "properties": {"text": {"type": "string", "pattern": pattern}}}
    odd = {"type": "function", "function": {"name": "odd", "parameters": schema, "strict": True}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            **{"model": "llm", "stream": stream, **asked.request, "tools": [*asked.request["tools"], odd]}
        )
    assert "tool 'odd'" in caught.value.message
    assert "#/properties/text/pattern" in caught.value.message
    assert caught.value.param == "tools"


@pytest.mark.parametrize("wish", ["one call", "strict"])
def test_tools_options_of_sdks_are_accepted(client: openai.OpenAI, wish: str) -> None:
    """`parallel_tool_calls: false` and `strict: true`, which agent SDKs send with every request, change no answer."""
    asked = dialogue("weather-call")
    (tool,) = asked.request["tools"]
    strict = {**tool, "function": {**tool["function"], "strict": True}}
    fields = {"parallel_tool_calls": False} if wish == "one call" else {"tools": [strict]}
    message = client.chat.completions.create(**({"model": "llm", **asked.request} | fields)).choices[0].message
    assert calls(message) == asked.tool_calls


def test_reasoning_is_apart_from_the_answer(client: openai.OpenAI) -> None:
    """The thought is in `reasoning`, the answer in `content`, and no tag is left in either."""
    asked = dialogue("thinking")
    message = client.chat.completions.create(model="llm", **asked.request).choices[0].message
    assert (message.content or "").strip() == asked.content
    assert message.reasoning.strip() == asked.reasoning


def test_reasoning_stream_comes_before_the_answer(client: openai.OpenAI) -> None:
    """In a stream the deltas of the thought come first and add up to the same thought."""
    asked = dialogue("thinking")
    with client.chat.completions.create(model="llm", stream=True, **asked.request) as stream:
        deltas = [choice.delta for chunk in stream for choice in chunk.choices]
    thought = [getattr(delta, "reasoning", None) or "" for delta in deltas]
    said = [delta.content or "" for delta in deltas]
    assert "".join(thought).strip() == asked.reasoning
    assert "".join(said).strip() == asked.content
    last_thought = max(i for i, text in enumerate(thought) if text)
    assert last_thought <= min(i for i, text in enumerate(said) if text.strip())


def test_reasoning_switched_off_gives_the_answer_alone(client: openai.OpenAI) -> None:
    """`enable_thinking: false` leaves the thought out and keeps the answer."""
    asked = dialogue("thinking")
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    message = client.chat.completions.create(model="llm", extra_body=off, **asked.request).choices[0].message
    assert (message.content or "").strip() == asked.content
    assert not getattr(message, "reasoning", None)
