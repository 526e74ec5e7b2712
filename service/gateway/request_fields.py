"""What the door reads of a body, whatever the body's size, and how it sets a field without a copy.

Fields that are not named here are skipped: their values become no Python objects. Duplicate keys: the last counts, as
in the engine's own reader.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import msgspec

from service.gateway.api_errors import Refusal
from service.in_engine.vllm_service import request_lists

N_LIMIT = 16  # vLLM itself allows 16384 answers to one request
NAME_LIMIT = 512  # bytes of a model's name
SHAPE_LIMIT = 256 * 1024  # bytes of a field that says what the output is like
TOOLS_LIMIT = 1024 * 1024

# What vLLM 0.32 takes without a word and then ignores -> what to use today.
# Source: vllm/entrypoints/serve/engine/protocol.py, _REMOVED_GUIDED_FIELDS
GUIDED = {
    "guided_json": "Use structured_outputs.json, or response_format of type json_schema",
    "guided_regex": "Use structured_outputs.regex",
    "guided_choice": "Use structured_outputs.choice",
    "guided_grammar": "Use structured_outputs.grammar",
    "guided_decoding_backend": "Leave it out: the service has one backend",
    "guided_whitespace_pattern": "Leave it out: structured outputs have no free white space here",
}
_SHAPES = ("response_format", "structured_outputs", "text", "output_config", "tools")
_EMPTY = re.compile(rb"\s*\{\s*\}")


_NAMES = ("model", "stream", "n", "best_of", "temperature", "tool_choice", *_SHAPES, *GUIDED)
# Of views into the body, which keep it alive: they end with `read`.
_Fields = msgspec.defstruct("_Fields", [(name, msgspec.Raw | msgspec.UnsetType, msgspec.UNSET) for name in _NAMES])
_DECODER = msgspec.json.Decoder(_Fields)
_NULL = msgspec.Raw(b"null")
_NO_TOOLS = re.compile(rb"\[\s*\]")
_DIGITS = 20  # longer is no count


class Asked(msgspec.Struct, frozen=True):
    """What a request asks for, as far as the door is concerned. It keeps nothing of the body alive.

    Attributes:
        model: The name in the body.
        stream: Whether the answer is to be streamed.
        n: How many answers.
        best_of: Of how many candidates.
        shapes: What the output is to be like, tools included: field -> its JSON.
        present: Which of `temperature` and `tool_choice` the body sets.
        forces_tool: Whether `tool_choice` demands a call; engines then compile tools that are not strict, too.
    """

    model: str | None = None
    stream: bool | None = None
    n: int | None = None
    best_of: int | None = None
    shapes: Mapping[str, bytes] = {}
    present: frozenset[str] = frozenset()
    forces_tool: bool = False

    @property
    def has_tools(self) -> bool:
        """Whether there is at least one tool."""
        return "tools" in self.shapes

    def sets(self, name: str) -> bool:
        """Tell whether the body gives `temperature` or `tool_choice` a value; null is none."""
        return name in self.present


def read(body: bytes | bytearray | memoryview) -> Asked:
    """Read the fields that matter here; the body is neither copied nor kept.

    Raises:
        Refusal: 400: the body is no JSON object, or one of these fields has a value that is refused here.
    """
    fields = _decoded(body)
    given = {name: raw for name in _NAMES if (raw := getattr(fields, name)) is not msgspec.UNSET and raw != _NULL}
    for name, today in GUIDED.items():
        if name in given:
            raise _refusal(name, f"{name} no longer exists: it would be ignored. {today}.", "unsupported_parameter")
    return Asked(
        model=_model(given.get("model")),
        stream=_stream(given.get("stream")),
        n=_count("n", given.get("n")),
        best_of=_count("best_of", given.get("best_of")),
        shapes={name: _shape(name, raw) for name in _SHAPES if (raw := given.get(name)) and _is_shape(name, raw)},
        present=frozenset(given.keys() & {"temperature", "tool_choice"}),
        forces_tool=_forces_tool(given.get("tool_choice")),
    )


def check_lists(path: str, body: bytes | bytearray) -> None:
    """Check what the lists of a body hold, by the rule that the guard of an engine has too.

    Raises:
        Refusal: 400: an item is not what its list has, or there are too many.
    """
    try:
        request_lists.check(path, body)
    except request_lists.InvalidListError as error:
        raise Refusal(400, str(error), code="invalid_value", param=error.param) from None


def rewritten(body: bytes | bytearray, changes: Mapping[str, str | float]) -> tuple[memoryview, bytes]:
    """Return a body that `read` accepted as two parts, the second of which sets these fields; the first is no copy.

    The fields are added at the end, where they win over those of the same name before.
    """
    added = json.dumps(dict(changes), allow_nan=False, separators=(",", ":"))[1:].encode()
    comma = b"" if not changes or _EMPTY.match(body) else b","
    return memoryview(body)[: body.rfind(b"}")], comma + added


def _decoded(body: bytes | bytearray | memoryview) -> msgspec.Struct:
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
    if len(memoryview(raw)) > NAME_LIMIT:
        raise _refusal("model", f"model is longer than any name: over {NAME_LIMIT} bytes. /v1/models lists all names.")
    try:
        return msgspec.json.decode(raw, type=str)
    except msgspec.DecodeError:
        raise _refusal("model", f"model={_shown(raw)} is not a string. /v1/models lists all names.") from None


def _stream(raw: msgspec.Raw | None) -> bool | None:
    try:
        return None if raw is None else msgspec.json.decode(raw, type=bool)
    except msgspec.DecodeError:
        raise _refusal("stream", f"stream={_shown(raw)} is not a boolean. Write true or false.") from None


def _forces_tool(raw: msgspec.Raw | None) -> bool:
    try:
        value = None if raw is None else msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return True
    return (value.get("type") if isinstance(value, dict) else value) not in (None, "auto", "none")


def _count(name: str, raw: msgspec.Raw | None) -> int | None:
    if raw is None:
        return None
    try:
        count = msgspec.json.decode(raw, type=int) if len(memoryview(raw)) <= _DIGITS else 0
    except msgspec.DecodeError:
        count = 0
    if not 1 <= count <= N_LIMIT:
        raise _refusal(name, f"{name}={_shown(raw)} is not an integer from 1 to {N_LIMIT}. Send several requests.")
    return count


def _is_shape(name: str, raw: msgspec.Raw) -> bool:
    """Tell whether a value can be what its name says; the engine has its own words for all others."""
    text = bytes(memoryview(raw)[:1])
    return text == b"{" if name != "tools" else text == b"[" and not _NO_TOOLS.fullmatch(raw)


def _shape(name: str, raw: msgspec.Raw) -> bytes:
    limit = TOOLS_LIMIT if name == "tools" else SHAPE_LIMIT
    if (size := len(memoryview(raw))) > limit:
        raise _refusal(name, f"{name} is {size} bytes long; at most {limit} are compiled.", "invalid_grammar")
    return bytes(raw)


def _shown(raw: msgspec.Raw | None) -> str:
    text = bytes(memoryview(raw or b"")[:40]).decode(errors="replace")
    return text if len(text) < 40 else f"{text}…"


def _not_json(what: str) -> Refusal:
    return Refusal(400, f"The body {what}. Send one JSON object in UTF-8.", code="invalid_json")


def _refusal(name: str, sentence: str, code: str = "invalid_value") -> Refusal:
    return Refusal(400, sentence, code=code, param=name)
