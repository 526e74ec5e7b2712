"""Bounds of what constrains the output of a request: schemas, tools, regular expressions, choices, grammars.

They take microseconds to milliseconds and are judged before a model wakes. What only compilation shows is judged
beside the engine (`in_engine/vllm_service/constraint_check.py`). Source of the bounds that vLLM has too:
vllm/sampling_params.py; of the figures: xgrammar 0.2.8 on one core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from service.gateway.request_fields import RequestFields
from service.in_engine.vllm_service.api_error import APIError

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

Value = dict[str, Any]


def check(fields: RequestFields) -> None:
    """Check the constraints of a request.

    Raises:
        APIError: 400 `invalid_grammar`: one is over a bound, or has the wrong type.
    """
    for name, raw in fields.constraints.items():
        try:
            value = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise _error(
                name, "is not JSON that can be parsed: it has invalid UTF-8, or a lone surrogate such as \\ud800"
            ) from None
        _CHECKS[name](value)


def _error(param: str, fault: str) -> APIError:
    return APIError(
        400,
        f"{param} {fault}. Correct it; it was not sent to the model.",
        code="invalid_grammar",
        param=param.partition("[")[0],
    )


def _response_format(value: Value) -> None:
    if value.get("type") == "structural_tag":
        _check_schema(value, "response_format", _TAG_NESTING)
    elif value.get("type") == "json_schema":
        _schema_in(_dict(value, "json_schema"), "response_format.json_schema.schema")


def _responses_text(value: Value) -> None:
    _schema_in(_dict(value, "format"), "text.format.schema")


def _messages_output(value: Value) -> None:
    _schema_in(_dict(value, "format"), "output_config.format.schema")


def _structured_outputs(value: Value) -> None:
    for kind, check_kind in _STRUCTURED.items():
        if value.get(kind) is not None:
            check_kind(value[kind], f"structured_outputs.{kind}")


def _tools(value: list[Any]) -> None:
    """Check every schema that a tool has in any place: which one is read depends on the route."""
    if len(value) > TOOLS:
        raise _error("tools", f"has {len(value)} tools; at most {TOOLS} are served")
    for position, tool in enumerate(value):
        holder = tool if isinstance(tool, dict) else {}
        for place, function in (("", holder), (".function", _dict(holder, "function"))):
            for field in ("parameters", "input_schema"):
                if isinstance(schema := function.get(field), dict):
                    _check_schema(schema, f"tools[{position}]{place}.{field}")


def _schema_in(value: Value, param: str) -> None:
    if value.get("schema") is not None:
        _schema(value["schema"], param)


def _schema(value: object, param: str) -> None:
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError) as error:
            raise _error(param, f"is a string, but not a JSON schema: {error}") from None
    if not isinstance(value, dict | bool):
        raise _error(param, f"is of type {type(value).__name__}; a JSON schema is an object")
    _check_schema(value, param)


def _regex(value: object, param: str) -> None:
    text = _text(value, param, REGEX_LIMIT)
    if "\0" in text:
        raise _error(param, "holds a NUL character")


def _choice(value: object, param: str) -> None:
    if not isinstance(value, list) or not value or not all(isinstance(choice, str) for choice in value):
        raise _error(param, "is not a list of at least one string")
    if len(value) > CHOICES:
        raise _error(param, f"has {len(value)} choices; at most {CHOICES} are served")


def _grammar(value: object, param: str) -> None:
    if not _text(value, param, GRAMMAR_LIMIT).strip():
        raise _error(param, "is empty")


def _tag(value: object, param: str) -> None:
    text = _text(value, param, _TAG_LIMIT)
    try:
        tag = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _error(param, f"is not JSON: {error}") from None
    if not isinstance(tag, dict):
        raise _error(param, f"is of type {type(tag).__name__}; a structural tag is an object")
    _check_schema(tag, param, _TAG_NESTING)


def _text(value: object, param: str, limit: int) -> str:
    if not isinstance(value, str):
        raise _error(param, f"is of type {type(value).__name__}, not a string")
    if (size := len(value.encode())) > limit:
        raise _error(param, f"is {size} bytes long; at most {limit} are served")
    return value


def _check_schema(schema: object, param: str, nesting: int = NESTING) -> None:
    """Check the bounds level by level: a schema may be nested deeper than Python recurses."""
    level, depth, properties, values = [schema], 0, 0, 0
    while level := [node for node in level if isinstance(node, dict | list)]:
        depth += 1
        if depth > nesting:
            raise _error(param, f"is nested deeper than {nesting} levels")
        for node in level:
            if isinstance(node, dict):
                properties += _check_object(node, param)
                values += len(node["enum"]) if isinstance(node.get("enum"), list) else 0
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
    if properties > PROPERTIES:
        raise _error(param, f"has {properties} properties; at most {PROPERTIES} are served")
    if values > VALUES:
        raise _error(param, f"has {values} values in enums; at most {VALUES} are served")


def _check_object(schema: Value, param: str) -> int:
    """Check what one object alone can make expensive, and return its number of properties."""
    count, required = len(_dict(schema, "properties")), schema.get("required")
    optional = count - (len(required) if isinstance(required, list) else 0)
    if optional > OPTIONAL_PROPERTIES:
        raise _error(
            param, f"has an object with {optional} optional properties; at most {OPTIONAL_PROPERTIES} are served"
        )
    most = schema.get("maxProperties", count if schema.get("minProperties") else 0)
    if isinstance(most, int) and count * min(most, count) > COUNTED_PROPERTIES:
        raise _error(param, f"counts up to {most} of {count} properties; leave minProperties and maxProperties out")
    return count


def _dict(value: Value, name: str) -> Value:
    return found if isinstance(found := value.get(name), dict) else {}


_STRUCTURED: dict[str, Callable[[object, str], None]] = {
    "json": _schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "structural_tag": _tag,
}
_CHECKS: dict[str, Callable[[Any], None]] = {
    "response_format": _response_format,
    "text": _responses_text,
    "output_config": _messages_output,
    "structured_outputs": _structured_outputs,
    "tools": _tools,
}
