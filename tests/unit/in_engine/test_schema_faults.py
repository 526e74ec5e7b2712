"""The place of a fault in a JSON schema, found by what is refused and not by what an error says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from vllm_service.schema_faults import Fault, fault_of, schemas_in

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "uniqueItems": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "a/b": {"anyOf": [{"type": "null"}, {"type": "string", "format": "date"}]},
        "node": {"$ref": "#/$defs/node"},
    },
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "text": {"type": "string"}}}},
}


def refuse_odd(schema: Any) -> None:
    """Refuse a schema with a keyword `odd`, reached as a library reaches it: by references too."""

    def look(node: Any, seen: tuple[str, ...]) -> None:
        for key, value in node.items() if isinstance(node, dict) else ():
            if key == "odd" and "type" in node:
                raise RuntimeError("[21:41:55] /project/cpp/x.cc:83: Keyword is\n not supported yet.\n")
            if key == "$ref" and value not in seen:
                look(schema.get("$defs", {})[value.rpartition("/")[2]], (*seen, value))
            elif key not in ("$defs", "enum"):
                for child in value if isinstance(value, list) else [value]:
                    look(child, seen)

    look(schema, ())


def with_odd(*path: str | int) -> dict[str, Any]:
    """Return the schema with the odd keyword at a place."""
    schema = json.loads(json.dumps(SCHEMA))
    node = schema
    for part in path:
        node = node[part]
    node["odd"] = 1
    return dict(schema)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ((), "#/odd"),
        (("properties", "tags"), "#/properties/tags/odd"),
        (("properties", "tags", "items"), "#/properties/tags/items/odd"),
        (("properties", "a/b", "anyOf", 1), "#/properties/a~1b/anyOf/1/odd"),
        (("$defs", "node"), "#/$defs/node/odd"),
        (("$defs", "node", "properties", "text"), "#/$defs/node/properties/text/odd"),
    ],
)
def test_place_is_the_keyword_without_which_the_schema_passes(path: tuple[str | int, ...], place: str) -> None:
    """A property of a keyword's name is none, and a reference is followed."""
    assert fault_of(with_odd(*path), refuse_odd) == Fault(place, "Keyword is not supported yet")


def test_first_of_several_faults_is_told() -> None:
    """None of them alone can be taken away for the schema to pass."""
    schema = with_odd("properties", "tags", "items")
    schema["properties"]["a/b"] = {"type": "null", "odd": 1}

    assert fault_of(schema, refuse_odd) == Fault("#/properties/tags/items/odd", "Keyword is not supported yet")


def test_schema_without_a_fault_has_none() -> None:
    """The values of `enum` are no schemas."""
    assert fault_of({**SCHEMA, "enum": [{"type": 1, "odd": 1}]}, refuse_odd) is None


def test_place_of_a_fault_of_everything_is_the_schema_itself() -> None:
    """Nothing can be taken away."""

    def refuse(_: object) -> None:
        raise ValueError

    assert fault_of({"type": "string"}, refuse) == Fault("#", "ValueError")


@pytest.mark.parametrize(
    ("constraint", "schemas"),
    [
        ({"json": {"type": "string"}}, [{"type": "string"}]),
        ({"json": '{"type": "string"}'}, [{"type": "string"}]),
        ({"json": "{"}, []),
        ({"regex": "a"}, []),
        ({"structural_tag": '{"format": {"tags": [{"content": {"json_schema": {"a": 1}}}]}}'}, [{"a": 1}]),
        ({"structural_tag": '{"structures": [{"schema": {"a": 1}}, {"schema": {"b": 1}}]}'}, [{"a": 1}, {"b": 1}]),
    ],
)
def test_schemas_of_a_constraint_are_found(constraint: dict[str, Any], schemas: list[Any]) -> None:
    """Within structural tags of both kinds too."""
    assert schemas_in(constraint) == schemas
