"""Reads the few fields of a request's body that the gateway needs.

Other fields are skipped: their values become no Python objects. Of duplicate keys the last one counts, as in the
engine's own parser.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping

import msgspec

from service.in_engine.vllm_service.api_error import APIError
from service.in_engine.vllm_service.form_data import NAME_LIMIT, Form

MAX_N = 16  # answers to one request; vLLM itself allows 16384
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
_MAX_TOKENS = ("max_tokens", "max_completion_tokens", "max_output_tokens")  # OpenAI's older, newer, and of Responses
_NAMES = ("model", "stream", "n", "best_of", *_MAX_TOKENS, "temperature", "tool_choice", *_CONSTRAINTS, *REMOVED_FIELDS)
# The values of a _Fields are views that keep the body alive: they must not outlive `parse_fields`.
_Fields = msgspec.defstruct("_Fields", [(name, msgspec.Raw | msgspec.UnsetType, msgspec.UNSET) for name in _NAMES])
_values_of = operator.attrgetter(*_NAMES)
_REMOVED, _PRESENT = frozenset(REMOVED_FIELDS), frozenset(("temperature", "tool_choice"))
_DECODER = msgspec.json.Decoder(_Fields)
_TEXT, _BOOLEAN = msgspec.json.Decoder(str), msgspec.json.Decoder(bool)  # a type in each call takes 1 us to look at
_NULL = msgspec.Raw(b"null")
_EMPTY_LIST = re.compile(rb"\[\s*\]")
_NO_CALL = re.compile(rb'"none"|\{\s*"type"\s*:\s*"none"\s*\}')  # OpenAI's and Anthropic's
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
        declines_tools: `tool_choice` says that no tool may be called.
        max_tokens: The most tokens of an answer that the client asks for, as far as this is a number.
    """

    model: str | None = None
    stream: bool | None = None
    n: int | None = None
    best_of: int | None = None
    constraints: Mapping[str, bytes] = {}
    present: frozenset[str] = frozenset()
    declines_tools: bool = False
    max_tokens: int | None = None

    @property
    def has_tools(self) -> bool:
        """Whether there is at least one tool."""
        return "tools" in self.constraints

    def sets(self, name: str) -> bool:
        """Tell whether the body gives `temperature` or `tool_choice` a value; null is none."""
        return name in self.present


def parse_fields(body: bytes | bytearray | memoryview, max_n: int = MAX_N) -> RequestFields:
    """Read these fields; the body is neither copied nor kept.

    Args:
        body: The whole body.
        max_n: The most that `n` and `best_of` may be.

    Raises:
        APIError: 400: the body is no JSON object, or one of these fields has an invalid value.
    """
    fields = _decode(body)
    unset = msgspec.UNSET
    values = zip(_NAMES, _values_of(fields), strict=True)
    given = {name: raw for name, raw in values if raw is not unset and raw != _NULL}
    for name in _REMOVED & given.keys():
        advice = REMOVED_FIELDS[name]
        raise _api_error(name, f"vLLM has removed {name} and would ignore it. {advice}.", "unsupported_parameter")
    return RequestFields(
        model=_model(given.get("model")),
        stream=_stream(given.get("stream")),
        n=_count("n", given.get("n"), max_n),
        best_of=_count("best_of", given.get("best_of"), max_n),
        constraints={
            name: _constraint(name, given[name])
            for name in _CONSTRAINTS
            if name in given and _is_constraint(name, given[name])
        },
        present=_PRESENT & given.keys(),
        declines_tools="tool_choice" in given and bool(_NO_CALL.fullmatch(given["tool_choice"])),
        max_tokens=_max_tokens(given),
    )


def of_form(form: Form) -> RequestFields:
    """Return these fields of a form, which constrains no output and has no tools."""
    return RequestFields(model=form.model, stream=form.stream, n=form.n, max_tokens=form.max_tokens)


def _max_tokens(given: Mapping[str, msgspec.Raw]) -> int | None:
    """Return the largest of these fields; what is no number the engine refuses."""
    texts = [bytes(raw) for name in _MAX_TOKENS if (raw := given.get(name))]
    return max((int(text) for text in texts if text.isdigit() and len(text) <= _MAX_DIGITS), default=None)


def _decode(body: bytes | bytearray | memoryview) -> msgspec.Struct:
    try:
        return _DECODER.decode(body)
    except msgspec.ValidationError as error:  # "Expected `object`, got `array`"
        raise _not_json(f"is of type {str(error).rpartition(' ')[2].strip('`')}") from None
    except msgspec.DecodeError as error:
        if b"\0" in bytes(body[:4]):  # where UTF-16 and UTF-32 have one, whatever the first character of JSON is
            raise _not_json("is in UTF-16 or UTF-32") from None
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
        return _TEXT.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise _api_error("model", f"model={_excerpt(raw)} is not a string. /v1/models lists all names.") from None


def _stream(raw: msgspec.Raw | None) -> bool | None:
    try:
        return None if raw is None else _BOOLEAN.decode(raw)
    except msgspec.DecodeError:
        raise _api_error("stream", f"stream={_excerpt(raw)} is not a boolean. Write true or false.") from None


def _count(name: str, raw: msgspec.Raw | None, most: int) -> int | None:
    if raw is None:
        return None
    try:  # 1.0 is an integer too: JSON Schema, core, section 4.2.3
        count = msgspec.json.decode(raw, type=int | float) if len(memoryview(raw)) <= _MAX_DIGITS else 0
    except msgspec.DecodeError:
        count = 0
    if count != int(count) or not 1 <= count <= most:
        advice = f"Send several requests, or raise SERVICE_MAX_N ({most}; at most 200)."
        raise _api_error(name, f"{name}={_excerpt(raw)} is not an integer from 1 to {most}. {advice}")
    return int(count)


def _is_constraint(name: str, raw: msgspec.Raw) -> bool:
    """Tell whether a value has the type that its field needs; the engine refuses other types itself."""
    first = bytes(memoryview(raw)[:1])
    if name == "tools":
        return first == b"[" and not _EMPTY_LIST.fullmatch(raw)
    if name == "structured_outputs" and first != b"{":  # vLLM answers 500
        raise _api_error(name, f'structured_outputs={_excerpt(raw)} is not an object. Write {{"regex": …}} or such.')
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
