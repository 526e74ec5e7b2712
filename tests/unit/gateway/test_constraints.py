"""The bounds of schemas, expressions and grammars, which need no compiler."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from service.gateway import constraints, request_fields
from service.gateway.constraints import (
    CHOICES,
    NESTING,
    OPTIONAL_PROPERTIES,
    PROPERTIES,
    REGEX_LIMIT,
    VALUES,
)
from service.in_engine.vllm_service.api_error import APIError


def check(body: dict[str, Any]) -> None:
    """Check the constraints of a body."""
    constraints.check(request_fields.parse_fields(json.dumps(body).encode()))


def refused(body: dict[str, Any]) -> APIError:
    """Return what a body is refused with."""
    with pytest.raises(APIError) as caught:
        check(body)
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
def test_body_without_a_constraint_passes(body: dict[str, Any]) -> None:
    """Odd shapes are the engine's to refuse, in its own words."""
    check(body)


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
    """Each of these is refused without a running engine."""
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
    check({"structured_outputs": {"json": schema}})


@pytest.mark.parametrize(
    "place",
    [
        lambda schema: {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        lambda schema: {"text": {"format": {"type": "json_schema", "schema": schema}}},
        lambda schema: {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
        lambda schema: {"response_format": {"type": "structural_tag", "format": schema}},
        lambda schema: {"tools": [{"function": {"parameters": schema}}]},
        lambda schema: {"tools": [{"input_schema": schema}]},
        lambda schema: {"tools": [{"parameters": schema, "function": {"x": 1}}]},
        lambda schema: {"tools": [{"input_schema": schema, "function": {"parameters": {}}}]},
        lambda schema: {"tools": [{"parameters": {}, "function": {"name": "f", "parameters": schema}}]},
    ],
)
def test_schema_over_a_bound_is_refused_wherever_it_stands(place: Callable[[Any], dict[str, Any]]) -> None:
    """And the sentence tells where. A tool may have several, of which each route reads another."""
    refusal = refused(place(nested(NESTING + 17)))

    assert refusal.message.startswith(str(refusal.param))


def test_lone_surrogate_in_a_schema_is_refused() -> None:
    """The compilers' own JSON readers take none."""
    with pytest.raises(APIError) as caught:
        constraints.check(
            request_fields.RequestFields(constraints={"structured_outputs": b'{"json":{"enum":["\\udfff"]}}'})
        )

    assert "lone surrogate" in caught.value.message
