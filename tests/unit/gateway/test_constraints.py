"""Which schemas, expressions and grammars a body holds, and the bounds that need no compiler."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from service.gateway import request_fields
from service.gateway.api_errors import APIError
from service.gateway.constraints import (
    CHOICES,
    NESTING,
    OPTIONAL_PROPERTIES,
    PROPERTIES,
    REGEX_LIMIT,
    VALUES,
    Constraint,
    constraints,
)
from service.gateway.grammars import Grammars

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def found(body: dict[str, Any]) -> list[Constraint]:
    """Return the constraints of a body."""
    return list(constraints(request_fields.parse_fields(json.dumps(body).encode())))


def refused(body: dict[str, Any]) -> APIError:
    """Return what a body is refused with, where nothing can be compiled."""
    with pytest.raises(APIError) as caught:
        asyncio.run(Grammars().check(request_fields.parse_fields(json.dumps(body).encode())))
    assert (caught.value.status, caught.value.code) == (400, "invalid_grammar")
    assert caught.value.param
    return caught.value


def nested(levels: int) -> dict[str, Any]:
    """Return a schema of so many levels."""
    schema: dict[str, Any] = {}
    for _ in range(levels - 1):
        schema = {"items": schema}
    return schema


def properties(count: int, **more: Any) -> dict[str, Any]:
    """Return a schema of an object."""
    return {"type": "object", "properties": {f"p{i}": {} for i in range(count)}, **more}


@pytest.mark.parametrize(
    ("body", "kind", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, "json",
         "response_format.json_schema.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}}, "json", "text.format.schema"),
        ({"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, "json",
         "output_config.format.schema"),
        ({"structured_outputs": {"json": SCHEMA}}, "json", "structured_outputs.json"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json", "structured_outputs.json"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}]}, "tool",
         "tools[0].parameters"),
        ({"tools": [{"type": "function", "name": "f", "parameters": SCHEMA, "strict": True}]}, "tool",
         "tools[0].parameters"),
        ({"tools": [{"name": "f", "input_schema": SCHEMA, "strict": True}]}, "tool", "tools[0].input_schema"),
    ],
)  # fmt: skip
def test_schema_is_found_where_each_api_has_it(body: dict[str, Any], kind: str, param: str) -> None:
    """Chat, completions, Responses and Messages each have a place of their own."""
    constraint = found(body)[0]

    assert (constraint.kind, json.loads(constraint.text), constraint.param) == (kind, SCHEMA, param)


@pytest.mark.parametrize(
    ("choice", "is_compiled"),
    [
        (None, False),
        ("auto", False),
        ("none", False),
        ({"type": "auto"}, False),
        ("required", True),
        ({"type": "function", "function": {"name": "f"}}, True),
        ({"type": "any"}, True),
        ({"type": "tool", "name": "f"}, True),
    ],
)
def test_tool_that_is_not_strict_is_compiled_only_if_a_call_is_forced(choice: object, is_compiled: bool) -> None:
    """No other is compiled by vLLM, so that it cannot hold up an engine."""
    tool = {"name": "f", "input_schema": SCHEMA}

    assert bool(found({"tools": [tool], "tool_choice": choice})) is is_compiled


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("regex", "[a-z]+", "[a-z]+"),
        ("choice", ["a", "é"], '["a", "\\u00e9"]'),
        ("grammar", 'root ::= "a"', 'root ::= "a"'),
        ("structural_tag", '{"type":"structural_tag"}', '{"type":"structural_tag"}'),
    ],
)
def test_structured_output_of_any_kind_is_found(kind: str, value: object, text: str) -> None:
    """As it came."""
    assert found({"structured_outputs": {kind: value}}) == [Constraint(kind, text, f"structured_outputs.{kind}")]  # type: ignore[arg-type]


def test_structural_tag_in_response_format_is_found_whole() -> None:
    """The engine compiles all of it."""
    tag = {"type": "structural_tag", "format": {"type": "const_string", "value": "x"}}

    assert json.loads(found({"response_format": tag})[0].text) == tag


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        {"response_format": {"type": "json_schema", "json_schema": 3}},
        {"text": {"verbosity": "low"}},
        {"text": {"format": "text"}},
        {"output_config": {"effort": "low"}},
        {"structured_outputs": {"json_object": True, "regex": None}},
        {"tools": [{"type": "web_search"}, "text", {"function": {"parameters": {}}}, {"function": {"name": "f"}}]},
    ],
)
def test_body_without_a_constraint_has_nothing_to_compile(body: dict[str, Any]) -> None:
    """Odd shapes are the engine's to refuse, in its own words."""
    assert found(body) == []


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ({"json": []}, "of type list"),
        ({"json": 3}, "of type int"),
        ({"json": ""}, "not a JSON schema"),
        ({"json": "{"}, "not a JSON schema"),
        ({"json": '{"a":' * 100_000}, "bytes long"),
        ({"json": '{"a":' * 10_000}, "not a JSON schema"),
        ({"json": nested(NESTING + 1)}, f"deeper than {NESTING}"),
        ({"json": json.dumps(nested(NESTING + 1))}, f"deeper than {NESTING}"),
        ({"json": {"enum": [0] * (VALUES + 1)}}, f"{VALUES + 1} values"),
        ({"json": {"anyOf": [properties(PROPERTIES // 6) for _ in range(7)]}}, f"at most {PROPERTIES}"),
        ({"json": properties(OPTIONAL_PROPERTIES + 1)}, f"{OPTIONAL_PROPERTIES + 1} optional"),
        ({"json": properties(300, minProperties=1)}, "counts up to 300 of 300"),
        ({"json": properties(300, maxProperties=100)}, "counts up to 100 of 300"),
        ({"regex": ["a"]}, "of type list"),
        ({"regex": "a\0b"}, "NUL"),
        ({"regex": "a" * (REGEX_LIMIT + 1)}, f"at most {REGEX_LIMIT}"),
        ({"choice": []}, "list of at least one string"),
        ({"choice": "a"}, "list of at least one string"),
        ({"choice": ["a", 1]}, "list of at least one string"),
        ({"choice": ["a"] * (CHOICES + 1)}, f"at most {CHOICES}"),
        ({"grammar": " \n"}, "empty"),
        ({"grammar": {}}, "of type dict"),
        ({"structural_tag": "{"}, "not JSON"),
        ({"structural_tag": "[]"}, "of type list"),
        ({"structural_tag": {}}, "of type dict"),
        ({"structural_tag": json.dumps({"format": nested(NESTING + 16)})}, "deeper than 80"),
    ],
)
def test_structured_output_over_a_bound_is_refused(outputs: dict[str, Any], words: str) -> None:
    """Each of these needs no compiler, so that a gateway without one refuses it as well."""
    assert words in refused({"structured_outputs": outputs}).message


@pytest.mark.parametrize(
    "schema",
    [
        nested(NESTING),
        {"enum": [0] * VALUES},
        properties(OPTIONAL_PROPERTIES),
        properties(PROPERTIES, required=[f"p{i}" for i in range(PROPERTIES)]),
        properties(300, minProperties=0),
        properties(100, minProperties=1, maxProperties=100),
        True,
    ],
)
def test_schema_at_its_bounds_passes(schema: Any) -> None:
    """The bounds themselves are allowed."""
    asyncio.run(
        Grammars().check(request_fields.parse_fields(json.dumps({"structured_outputs": {"json": schema}}).encode()))
    )


@pytest.mark.parametrize(
    "place",
    [
        lambda schema: {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        lambda schema: {"text": {"format": {"type": "json_schema", "schema": schema}}},
        lambda schema: {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
        lambda schema: {"tools": [{"function": {"parameters": schema}}]},
        lambda schema: {"tools": [{"input_schema": schema}]},
    ],
)
def test_schema_over_a_bound_is_refused_wherever_it_stands(place: Callable[[Any], dict[str, Any]]) -> None:
    """And the sentence tells where."""
    refusal = refused(place(nested(NESTING + 1)))

    assert refusal.message.startswith(str(refusal.param))


def test_lone_surrogate_in_a_schema_is_refused() -> None:
    """The compiler's own JSON reader takes none."""
    with pytest.raises(APIError) as caught:
        asyncio.run(
            Grammars().check(
                request_fields.RequestFields(constraints={"structured_outputs": b'{"json":{"enum":["\\udfff"]}}'})
            )
        )

    assert "lone surrogate" in caught.value.message
