"""Reads the few fields of a request's body that the gateway needs, and overrides fields without copying the body.

Other fields are skipped: their values become no Python objects. Of duplicate keys the last one counts, as in the
engine's own parser.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import msgspec

from service.gateway.api_errors import APIError
from service.in_engine.vllm_service import request_lists

N_LIMIT = 16  # vLLM itself allows 16384 answers to one request
NAME_LIMIT = 512  # bytes of a model's name
CONSTRAINT_LIMIT = 256 * 1024  # bytes of a field that constrains the output, except tools
TOOLS_LIMIT = 1024 * 1024  # bytes of tools

# Removed fields that vLLM 0.32 ignores without an error -> what to use instead.
# Source: vllm/entrypoints/serve/engine/protocol.py, _REMOVED_GUIDED_FIELDS
REMOVED_FIELDS = {
    "guided_json": "Use structured_outputs.json, or response_format of type json_schema",
    "guided_regex": "Use structured_outputs.regex",
    "guided_choice": "Use structured_outputs.choice",
    "guided_grammar": "Use structured_outputs.grammar",
    "guided_decoding_backend": "Leave it out: the service has one backend",
    "guided_whitespace_pattern": "Leave it out: structured outputs have no free white space here",
}
_CONSTRAINTS = ("response_format", "structured_outputs", "text", "output_config", "tools")
_EMPTY_OBJECT = re.compile(rb"\s*\{\s*\}")
_NAMES = ("model", "stream", "n", "best_of", "temperature", "tool_choice", *_CONSTRAINTS, *REMOVED_FIELDS)
# The values of a _Fields are views that keep the body alive: they must not outlive `parse_fields`.
_Fields = msgspec.defstruct("_Fields", [(name, msgspec.Raw | msgspec.UnsetType, msgspec.UNSET) for name in _NAMES])
_DECODER = msgspec.json.Decoder(_Fields)
_NULL = msgspec.Raw(b"null")
_EMPTY_LIST = re.compile(rb"\[\s*\]")
_MAX_DIGITS = 20  # a longer number is over every limit and is not decoded


class RequestFields(msgspec.Struct, frozen=True):
    """The fields of a request that the gateway needs. It keeps nothing of the body alive.

    Attributes:
        model: The name in the body.
        stream: Whether the client asks for a stream.
        n: How many answers the client asks for.
        best_of: How many candidates they are chosen from.
        constraints: The fields that constrain the output, tools included: field -> its JSON.
        present: Which of `temperature` and `tool_choice` the body sets.
        forces_tool: Whether `tool_choice` demands a call; the engine then compiles all tools, not only strict ones.
    """

    model: str | None = None
    stream: bool | None = None
    n: int | None = None
    best_of: int | None = None
    constraints: Mapping[str, bytes] = {}
    present: frozenset[str] = frozenset()
    forces_tool: bool = False

    @property
    def has_tools(self) -> bool:
        """Whether there is at least one tool."""
        return "tools" in self.constraints

    def sets(self, name: str) -> bool:
        """Tell whether the body gives `temperature` or `tool_choice` a value; null is none."""
        return name in self.present


def parse_fields(body: bytes | bytearray | memoryview) -> RequestFields:
    """Read these fields; the body is neither copied nor kept.

    Raises:
        APIError: 400: the body is no JSON object, or one of these fields has an invalid value.
    """
    fields = _decode(body)
    given = {name: raw for name in _NAMES if (raw := getattr(fields, name)) is not msgspec.UNSET and raw != _NULL}
    for name, advice in REMOVED_FIELDS.items():
        if name in given:
            raise _api_error(name, f"vLLM has removed {name} and would ignore it. {advice}.", "unsupported_parameter")
    return RequestFields(
        model=_model(given.get("model")),
        stream=_stream(given.get("stream")),
        n=_count("n", given.get("n")),
        best_of=_count("best_of", given.get("best_of")),
        constraints={
            name: _constraint(name, raw)
            for name in _CONSTRAINTS
            if (raw := given.get(name)) and _is_constraint(name, raw)
        },
        present=frozenset(given.keys() & {"temperature", "tool_choice"}),
        forces_tool=_forces_tool(given.get("tool_choice")),
    )


def check_lists(path: str, body: bytes | bytearray) -> None:
    """Check the lists of a body by the rule that the guard in the engine applies.

    Raises:
        APIError: 400: an item has a wrong type, or there are too many.
    """
    try:
        request_lists.check(path, body)
    except request_lists.InvalidListError as error:
        raise APIError(400, str(error), code="invalid_value", param=error.param) from None


def with_overrides(body: bytes | bytearray, overrides: Mapping[str, str | float]) -> tuple[memoryview, bytes]:
    """Return a body with these fields set, in two parts: a view of `body` without its last brace, and the rest.

    `body` is one that `parse_fields` accepted. The fields come last, where they win over earlier ones of the same name.
    """
    added = json.dumps(dict(overrides), allow_nan=False, separators=(",", ":"))[1:].encode()
    comma = b"" if not overrides or _EMPTY_OBJECT.match(body) else b","
    return memoryview(body)[: body.rfind(b"}")], comma + added


def _decode(body: bytes | bytearray | memoryview) -> msgspec.Struct:
    try:
        return _DECODER.decode(body)
    except msgspec.ValidationError as error:  # "Expected `object`, got `array`"
        raise _not_json(f"is of type {str(error).rpartition(' ')[2].strip('`')}") from None
    except msgspec.DecodeError as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        if "truncated" in reason:
            reason = f"it ends too soon, after {len(body)} bytes, or an escape such as \\ud800 lacks its second half"
        raise _not_json(f"is not JSON: {reason}") from None
    except RecursionError:
        raise _not_json("is nested too deeply") from None


def _model(raw: msgspec.Raw | None) -> str | None:
    if raw is None:
        return None
    if (size := len(memoryview(raw))) > NAME_LIMIT:
        raise _api_error("model", f"model is {size} bytes long; the limit is {NAME_LIMIT}. /v1/models lists all names.")
    try:
        return msgspec.json.decode(raw, type=str)
    except msgspec.DecodeError:
        raise _api_error("model", f"model={_excerpt(raw)} is not a string. /v1/models lists all names.") from None


def _stream(raw: msgspec.Raw | None) -> bool | None:
    try:
        return None if raw is None else msgspec.json.decode(raw, type=bool)
    except msgspec.DecodeError:
        raise _api_error("stream", f"stream={_excerpt(raw)} is not a boolean. Write true or false.") from None


def _forces_tool(raw: msgspec.Raw | None) -> bool:
    try:
        value = None if raw is None else msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return True  # unknown: the stricter check
    return (value.get("type") if isinstance(value, dict) else value) not in (None, "auto", "none")


def _count(name: str, raw: msgspec.Raw | None) -> int | None:
    if raw is None:
        return None
    try:
        count = msgspec.json.decode(raw, type=int) if len(memoryview(raw)) <= _MAX_DIGITS else 0
    except msgspec.DecodeError:
        count = 0
    if not 1 <= count <= N_LIMIT:
        raise _api_error(name, f"{name}={_excerpt(raw)} is not an integer from 1 to {N_LIMIT}. Send several requests.")
    return count


def _is_constraint(name: str, raw: msgspec.Raw) -> bool:
    """Tell whether a value has the type that its field needs; the engine refuses other types itself."""
    first = bytes(memoryview(raw)[:1])
    if name == "tools":
        return first == b"[" and not _EMPTY_LIST.fullmatch(raw)
    return first == b"{"


def _constraint(name: str, raw: msgspec.Raw) -> bytes:
    limit = TOOLS_LIMIT if name == "tools" else CONSTRAINT_LIMIT
    if (size := len(memoryview(raw))) > limit:
        raise _api_error(
            name, f"{name} is {size} bytes long; the limit is {limit}. Send a shorter one.", "invalid_grammar"
        )
    return bytes(raw)


def _excerpt(raw: msgspec.Raw | None) -> str:
    text = bytes(memoryview(raw or b"")[:40]).decode(errors="replace")
    return text if len(text) < 40 else f"{text}…"


def _not_json(what: str) -> APIError:
    return APIError(400, f"The body {what}. Send one JSON object in UTF-8.", code="invalid_json")


def _api_error(name: str, sentence: str, code: str = "invalid_value") -> APIError:
    return APIError(400, sentence, code=code, param=name)
