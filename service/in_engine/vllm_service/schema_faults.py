"""Finds the place of a fault in a JSON schema, whatever the error of the library that refused the schema says.

The innermost part that is refused alone holds the fault; the keyword without which it is accepted is the fault.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_BY_NAME = ("properties", "patternProperties", "dependentSchemas")  # their keys are no keywords
_DEFINITIONS = ("$defs", "definitions")
_VALUES = ("const", "enum", "default", "examples")  # hold values, not schemas
_SOURCE = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: (Check failed: .* is false: )?")  # of a library's line
_SHOWN = 300


class Fault(NamedTuple):
    """A fault: the JSON pointer of a keyword, and the library's reason."""

    place: str
    reason: str


def fault_of(schema: dict[str, Any], check: Callable[[Any], object]) -> Fault | None:
    """Return the first fault of a schema; None when `check` accepts it.

    Args:
        schema: A JSON schema.
        check: Raises what is wrong with a schema.
    """
    reason = _reason(schema, check)
    if reason is None:
        return None
    definitions = {name: dict(schema[name]) for name in _DEFINITIONS if isinstance(schema.get(name), dict)}
    node, place = schema, "#"
    while found := _inner(node, place, definitions, check):
        node, place, reason = found
    for keyword in sorted(node, key=lambda keyword: keyword == "type"):  # without a type most keywords do nothing
        rest = {key: value for key, value in node.items() if key != keyword}
        if keyword not in definitions and _reason({**definitions, **rest}, check) is None:
            return Fault(f"{place}/{escape(keyword)}", reason)
    return Fault(place, reason)


def schemas_in(constraint: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the JSON schemas of a constraint: the one that it is, or those within a structural tag."""
    text = constraint.get("json") or constraint.get("structural_tag")
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return []
    if "structural_tag" not in constraint:
        return [value] if isinstance(value, dict) else []
    found, todo = [], [value]
    while todo:
        node = todo.pop(0)
        children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in children:
            (found if key in ("json_schema", "schema") else todo).append(child)
    return [schema for schema in found if isinstance(schema, dict)]


def _inner(
    node: dict[str, Any], place: str, definitions: dict[str, dict[str, Any]], check: Callable[[Any], object]
) -> tuple[dict[str, Any], str, str] | None:
    """Return the first part of a schema that is refused alone, its place and the reason."""
    for child, where in _subschemas(node, place):
        if isinstance(child, dict) and (reason := _reason({**definitions, **child}, check)) is not None:
            return child, where, reason
    group, _, name = str(node.get("$ref")).removeprefix("#/").partition("/")
    named = definitions.get(group, {})
    name = name.replace("~1", "/").replace("~0", "~")
    if not isinstance(child := named.get(name), dict):
        return None
    reason = _reason({**definitions, **child}, check)
    named[name] = {}  # where it refers to itself, that is not its fault
    return None if reason is None else (child, str(node["$ref"]), reason)


def _subschemas(node: dict[str, Any], place: str) -> Iterator[tuple[Any, str]]:
    for key, value in node.items():
        inside = f"{place}/{escape(key)}"
        if key in _DEFINITIONS or key in _VALUES:
            continue
        if key in _BY_NAME and isinstance(value, dict):
            yield from ((child, f"{inside}/{escape(name)}") for name, child in value.items())
        elif isinstance(value, list):
            yield from ((child, f"{inside}/{index}") for index, child in enumerate(value))
        else:
            yield value, inside


def _reason(schema: Any, check: Callable[[Any], object]) -> str | None:
    try:
        check(schema)
    except Exception as error:  # noqa: BLE001 - libraries raise whatever they like
        return plain(str(error) or type(error).__name__)
    return None


def plain(words: str) -> str:
    """Return a library's error without the line of its source, on one line and not longer than it is read."""
    return " ".join(_SOURCE.sub("", words).split())[:_SHOWN].rstrip(". ") or "a check within the compiler failed"


def escape(name: str) -> str:
    """Return a name as a part of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")
