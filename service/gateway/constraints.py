"""The output constraints of a request: its schemas, regular expressions and grammars, and the bounds of each.

The bounds need no compiler; they keep out what is known to cost an engine minutes. Source of those that vLLM has too:
vllm/sampling_params.py; of the figures: xgrammar 0.2.8 on one core.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from service.gateway.api_errors import APIError
from service.gateway.request_fields import RequestFields

NESTING = 64  # of a schema, as in vLLM
_TAG_NESTING = NESTING + 16
PROPERTIES = 5000  # in all of a schema, as in OpenAI's API
OPTIONAL_PROPERTIES = 1000  # of one object: 1.2 s, and 16 s for twice as many
COUNTED_PROPERTIES = 10_000  # properties times maxProperties of one object: 1 s
VALUES = 10_000  # in all enums of a schema: 0.5 s
CHOICES = 10_000
TOOLS = 512
REGEX_LIMIT = 32 * 1024  # bytes
GRAMMAR_LIMIT = 128 * 1024
_TAG_LIMIT = 512 * 1024  # a field of 256 KiB, with its letters outside ASCII written as escapes

Kind = Literal["json", "tool", "regex", "choice", "grammar", "structural_tag"]
Value = dict[str, Any]


@dataclass(frozen=True)
class Constraint:
    """One thing to compile.

    Attributes:
        kind: What `text` is. A `tool` is the JSON schema of a tool's arguments.
        text: Schema and structural tag as JSON, choices as a JSON array, everything else as it came.
        param: Where it stood in the body.
    """

    kind: Kind
    text: str
    param: str


def constraints(fields: RequestFields) -> Iterator[Constraint]:
    """Yield what a request wants compiled, each within its bounds.

    Raises:
        APIError: 400: a constraint is over a bound, or has the wrong type.
    """
    for name, raw in fields.constraints.items():
        try:
            value = msgspec.json.decode(raw)
        except (msgspec.DecodeError, RecursionError):
            raise constraint_error(
                name, "is not JSON that can be parsed; a lone surrogate such as \\ud800 is invalid"
            ) from None
        yield from _tools(value, fields.forces_tool) if name == "tools" else _READERS[name](value)


def constraint_error(param: str, fault: str) -> APIError:
    """Return the answer to a constraint that cannot be served."""
    return APIError(
        400,
        f"{param} {fault}. Correct it; it was not sent to the model.",
        code="invalid_grammar",
        param=param.partition("[")[0],
    )


def _response_format(value: Value, name: str = "response_format") -> Iterator[Constraint]:
    if value.get("type") == "structural_tag":
        yield _tag(json.dumps(value), name)
    elif value.get("type") == "json_schema":
        inner = value.get("json_schema")
        yield from _schema_in(inner if isinstance(inner, dict) else {}, f"{name}.json_schema.schema")


def _responses_text(value: Value) -> Iterator[Constraint]:
    yield from _schema_in(_dict(value, "format"), "text.format.schema")


def _messages_output(value: Value) -> Iterator[Constraint]:
    yield from _schema_in(_dict(value, "format"), "output_config.format.schema")


def _structured_outputs(value: Value) -> Iterator[Constraint]:
    for kind, read in _STRUCTURED.items():
        if value.get(kind) is not None:
            yield read(value[kind], f"structured_outputs.{kind}")


def _tools(value: list[Any], are_forced: bool) -> Iterator[Constraint]:
    """Check the arguments' schemas, and yield those that vLLM compiles: of strict tools; of all if a call is forced."""
    if len(value) > TOOLS:
        raise constraint_error("tools", f"has {len(value)} tools; at most {TOOLS} are compiled")
    for position, tool in enumerate(value):
        if isinstance(tool, dict):
            function = _dict(tool, "function") or tool
            for field in ("parameters", "input_schema"):
                if isinstance(schema := function.get(field), dict) and schema:
                    param = f"tools[{position}].{field}"
                    _check_schema(schema, param)
                    if function.get("strict") or are_forced:
                        yield Constraint("tool", json.dumps(schema), param)


def _schema_in(value: Value, param: str) -> Iterator[Constraint]:
    if value.get("schema") is not None:
        yield _schema(value["schema"], param)


def _schema(value: object, param: str) -> Constraint:
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError) as error:
            raise constraint_error(param, f"is a string, but not a JSON schema: {error}") from None
    if not isinstance(value, dict | bool):
        raise constraint_error(param, f"is of type {type(value).__name__}; a JSON schema is an object")
    _check_schema(value, param)
    return Constraint("json", json.dumps(value), param)


def _regex(value: object, param: str) -> Constraint:
    text = _text(value, param, REGEX_LIMIT)
    if "\0" in text:
        raise constraint_error(param, "holds a NUL character")
    return Constraint("regex", text, param)


def _choice(value: object, param: str) -> Constraint:
    if not isinstance(value, list) or not value or not all(isinstance(choice, str) for choice in value):
        raise constraint_error(param, "is not a list of at least one string")
    if len(value) > CHOICES:
        raise constraint_error(param, f"has {len(value)} choices; at most {CHOICES} are compiled")
    return Constraint("choice", json.dumps(value), param)


def _grammar(value: object, param: str) -> Constraint:
    text = _text(value, param, GRAMMAR_LIMIT)
    if not text.strip():
        raise constraint_error(param, "is empty")
    return Constraint("grammar", text, param)


def _tag(value: object, param: str) -> Constraint:
    text = _text(value, param, _TAG_LIMIT)
    try:
        tag = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise constraint_error(param, f"is not JSON: {error}") from None
    if not isinstance(tag, dict):
        raise constraint_error(param, f"is of type {type(tag).__name__}; a structural tag is an object")
    _check_schema(tag, param, _TAG_NESTING)
    return Constraint("structural_tag", text, param)


def _text(value: object, param: str, limit: int) -> str:
    if not isinstance(value, str):
        raise constraint_error(param, f"is of type {type(value).__name__}, not a string")
    if (size := len(value.encode())) > limit:
        raise constraint_error(param, f"is {size} bytes long; at most {limit} are compiled")
    return value


def _check_schema(schema: object, param: str, nesting: int = NESTING) -> None:
    """Check the bounds level by level: a schema may be nested deeper than Python recurses."""
    level, depth, properties, values = [schema], 0, 0, 0
    while level := [node for node in level if isinstance(node, dict | list)]:
        depth += 1
        if depth > nesting:
            raise constraint_error(param, f"is nested deeper than {nesting} levels")
        for node in level:
            if isinstance(node, dict):
                properties += _check_object(node, param)
                values += len(node["enum"]) if isinstance(node.get("enum"), list) else 0
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
    if properties > PROPERTIES:
        raise constraint_error(param, f"has {properties} properties; at most {PROPERTIES} are compiled")
    if values > VALUES:
        raise constraint_error(param, f"has {values} values in enums; at most {VALUES} are compiled")


def _check_object(schema: Value, param: str) -> int:
    """Check what one object alone can make expensive, and return its number of properties."""
    count, required = len(_dict(schema, "properties")), schema.get("required")
    optional = count - (len(required) if isinstance(required, list) else 0)
    if optional > OPTIONAL_PROPERTIES:
        raise constraint_error(
            param, f"has an object with {optional} optional properties; at most {OPTIONAL_PROPERTIES} are compiled"
        )
    most = schema.get("maxProperties", count if schema.get("minProperties") else 0)
    if isinstance(most, int) and count * min(most, count) > COUNTED_PROPERTIES:
        raise constraint_error(
            param, f"counts up to {most} of {count} properties; leave minProperties and maxProperties out"
        )
    return count


def _dict(value: Value, name: str) -> Value:
    return found if isinstance(found := value.get(name), dict) else {}


_STRUCTURED: dict[str, Callable[[object, str], Constraint]] = {
    "json": _schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "structural_tag": _tag,
}
_READERS: dict[str, Callable[[Any], Iterator[Constraint]]] = {
    "response_format": _response_format,
    "text": _responses_text,
    "output_config": _messages_output,
    "structured_outputs": _structured_outputs,
}
