"""Compares answers with what the OpenAPI document says of them."""

from __future__ import annotations

import re
from typing import Any

from jsonschema import Draft202012Validator

JSON, EVENTS = "application/json", "text/event-stream"


def answer_schema(document: dict[str, Any], method: str, path: str, status: int, media_type: str = JSON) -> Any:
    """Return the schema of an answer; of an error, by the first digit of its status."""
    responses = operation(document, method, path)["responses"]
    response = responses[str(status) if str(status) in responses else f"{status // 100}XX"]
    if reference := response.get("$ref"):
        response = document["components"]["responses"][reference.rpartition("/")[2]]
    return response["content"][media_type]["schema"]


def body_schema(document: dict[str, Any], method: str, path: str) -> Any:
    """Return the schema of a body."""
    return operation(document, method, path)["requestBody"]["content"][JSON]["schema"]


def operation(document: dict[str, Any], method: str, path: str) -> dict[str, Any]:
    """Return the operation of a method on a path, which may be one that a template stands for."""
    paths = document["paths"]
    known = path if path in paths else next(one for one in paths if re.fullmatch(re.sub(r"{\w+}", "[^/]+", one), path))
    found: dict[str, Any] = paths[known][method.lower()]
    return found


def faults(document: dict[str, Any], schema: Any, value: Any) -> list[str]:
    """Return what is wrong with a value: each violation, and each field of an object that no schema has."""
    validator = Draft202012Validator({"allOf": [schema], "components": document["components"]})
    found = [f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(value)]
    if isinstance(value, dict):
        known = _fields(document, schema)
        found += [f"{name} is in no schema" for name in value if known and name not in known]
    return found


def _fields(document: dict[str, Any], schema: Any) -> set[str]:
    if reference := schema.get("$ref"):
        return _fields(document, document["components"]["schemas"][reference.rpartition("/")[2]])
    alternatives = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    return {*schema.get("properties", ())}.union(*(_fields(document, one) for one in alternatives))


def is_same(first: Any, second: Any, first_schemas: Any, second_schemas: Any, seen: set[tuple[str, str]]) -> bool:
    """Tell whether two schemas are the same but for the names of the schemas that they refer to.

    Args:
        first: One of them.
        second: The other.
        first_schemas: Name -> schema of those that the first refers to.
        second_schemas: Likewise of the second.
        seen: Pairs of names that are compared already.
    """
    if isinstance(first, dict) and isinstance(second, dict):
        if "$ref" in first and "$ref" in second:
            names = first["$ref"].rpartition("/")[2], second["$ref"].rpartition("/")[2]
            if names in seen:
                return True
            seen.add(names)
            found = first_schemas[names[0]], second_schemas[names[1]]
            return is_same(*found, first_schemas, second_schemas, seen)
        ours, theirs = first.get("anyOf", ()), second.get("anyOf", ())  # in an order that follows from earlier imports
        if len(ours) != len(theirs) or not all(
            any(is_same(one, other, first_schemas, second_schemas, {*seen}) for other in theirs) for one in ours
        ):
            return False
        return first.keys() == second.keys() and all(
            is_same(one, second[name], first_schemas, second_schemas, seen)
            for name, one in first.items()
            if name not in {"anyOf", "mapping"}  # the latter, of a discriminator, has names
        )
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(
            is_same(*pair, first_schemas, second_schemas, seen) for pair in zip(first, second, strict=True)
        )
    return bool(first == second)
