"""Which lists a request's body may hold: how many items, and what an item must be. Gateway and guard both check it.

vLLM validates a list item by item on the event loop that serves all requests, so an unbounded list blocks all of them.
CPU time of vLLM 0.32's API process for one request, on one core, with the tiny model:

                  10,000 messages   with 5 parts each   10,000 items `{}`   100,000 items `0`
    /v1/responses           0.51 s             0.79 s     26 s, +7 GB         +22 GB, killed
    chat                    0.13 s             0.56 s      0.6 s, +0.2 GB      14 s, +1 GB
    /v1/messages            0.16 s             0.81 s      0.02 s               0.8 s, +0.1 GB

Pydantic tries every type of item for each one: 233 errors for each `{}` of /v1/responses.

A long session of an agent has some thousand messages, of one to five parts each. A list of texts (`prompt`, `input` of
embeddings) becomes as many requests to the engine; a list of tokens is bounded by the body's limit alone: 0.6 s for
10,000,000. An item that is of the right type and lacks a field is left to vLLM, which ends at the first such item
(`first_error`). The check itself: 3 us for a message, 10 ms for 10,000, 60 ms for 32 MiB of items `{}`.
"""

from __future__ import annotations

import operator
import re
import threading
from collections.abc import Mapping
from typing import Any, Literal, TypeGuard

import msgspec

from . import no_tools
from .request_counts import COUNTED, DOCUMENTS, SCORED, TEXTS, InvalidListError, check_scored, check_texts, check_values

ITEMS = 10_000  # messages or items of one list
PARTS = 50_000  # parts of all messages of one body together
TOOLS = 2_000  # 0.01 ms each

# Source of types and roles: vLLM's request models; tests/engine compares them.
ITEM_TYPES = (
    *("additional_tools", "apply_patch_call", "apply_patch_call_output", "code_interpreter_call", "compaction"),
    *("compaction_trigger", "computer_call", "computer_call_output", "configuration_update", "custom_tool_call"),
    *("custom_tool_call_output", "file_search_call", "function_call", "function_call_output"),
    *("image_generation_call", "item_reference", "local_shell_call", "local_shell_call_output"),
    *("mcp_approval_request", "mcp_approval_response", "mcp_call", "mcp_list_tools", "message", "program"),
    *("program_output", "reasoning", "shell_call", "shell_call_output", "tool_search_call", "tool_search_output"),
    "web_search_call",
)
ITEM_ROLES = ("assistant", "critic", "developer", "discriminator", "system", "tool", "unknown", "user")
ANTHROPIC_ROLES = ("assistant", "system", "user")
BLOCK_TYPES = (
    *("redacted_thinking", "image", "text", "thinking", "tool_addition", "tool_reference", "tool_removal"),
    *("tool_result", "tool_use"),
)
_SHOWN = 200  # characters of a reason, which may hold the client's value


class _Count(threading.local):
    """The objects decoded so far, so that decoding ends at the bound and not after 32 MiB of `{}`."""

    seen = bound = 0


_count = _Count()
_Unread = msgspec.Raw | msgspec.UnsetType  # a view into the body


class _Object(msgspec.Struct, gc=False):
    def __post_init__(self) -> None:
        _count.seen += 1
        if _count.seen > _count.bound:
            raise ValueError("too many")


class _Message(_Object):  # of chat: a template may know further roles
    role: str
    content: _Unread = msgspec.UNSET
    tool_calls: _Unread = msgspec.UNSET


class _AnthropicMessage(_Object):
    role: Literal[ANTHROPIC_ROLES]  # type: ignore[valid-type]
    content: _Unread = msgspec.UNSET


class _Block(_Object):
    type: Literal[BLOCK_TYPES]  # type: ignore[valid-type]
    content: _Unread = msgspec.UNSET


class _Item(_Object):
    type: Literal[ITEM_TYPES] | None = None  # type: ignore[valid-type]
    role: Literal[ITEM_ROLES] | None = None  # type: ignore[valid-type]
    id: _Unread = msgspec.UNSET
    content: _Unread = msgspec.UNSET
    output: _Unread = msgspec.UNSET
    summary: _Unread = msgspec.UNSET

    def __post_init__(self) -> None:
        if self.type is None and self.role is None and self.id is msgspec.UNSET:  # an id alone is an item_reference
            raise ValueError("Object has neither `type` nor `role`")
        super().__post_init__()


class _Scored(_Object):  # a query or a document that is more than a text
    content: _Unread = msgspec.UNSET


class _Typed(_Object):
    type: str


class _List:
    """What the items of one list must be.

    Args:
        item: The type of an item.
        texts: Whether an item may be a string as well.
        within: The lists that an item may have, by field.
    """

    def __init__(self, item: type[_Object], *, texts: bool = False, **within: _List) -> None:
        self.within = within
        self._objects = msgspec.json.Decoder(list[item])  # type: ignore[valid-type]
        self._mixed = msgspec.json.Decoder(list[item | str]) if texts else None  # type: ignore[valid-type]

    def decode(self, raw: msgspec.Raw) -> list[Any]:
        before = _count.seen
        try:
            return self._objects.decode(raw)
        except msgspec.ValidationError:
            # Strings are not counted as they come; the commas are an upper bound of them.
            if self._mixed is None or bytes(raw).count(b",") > PARTS:
                raise
            _count.seen = before
            return self._mixed.decode(raw)


_OBJECTS = _List(_Object)
_PARTS = _List(_Object, texts=True)
_TYPED = _List(_Typed)
_MESSAGES = _List(_Message, content=_PARTS, tool_calls=_OBJECTS)
_DOCUMENTS = _List(_Scored, content=_PARTS)
_BLOCKS = _List(_Block, content=_OBJECTS)
_CHAT = {"messages": _MESSAGES, "tools": _OBJECTS}
_ANTHROPIC = {"messages": _List(_AnthropicMessage, content=_BLOCKS), "system": _BLOCKS, "tools": _OBJECTS}
LISTS: Mapping[str, Mapping[str, _List]] = {
    "/v1/chat/completions": _CHAT,
    "/v1/responses": {"input": _List(_Item, content=_TYPED, output=_OBJECTS, summary=_TYPED), "tools": _OBJECTS},
    "/v1/messages": _ANTHROPIC,
    "/v1/messages/count_tokens": _ANTHROPIC,
    "/v1/embeddings": {"messages": _MESSAGES, "input": _MESSAGES},
    "/classify": {"messages": _MESSAGES},
    "/tokenize": _CHAT,
    **{path: dict.fromkeys(names, _DOCUMENTS) for path, names in SCORED.items()},
}
PATHS = LISTS.keys() | TEXTS.keys()
_BOUNDS = {"tools": TOOLS, "system": PARTS, **{name: DOCUMENTS for names in SCORED.values() for name in names}}
_NAMES = sorted({"tool_choice", *COUNTED, *(name for lists in LISTS.values() for name in lists)})
_FIELDS = msgspec.json.Decoder(msgspec.defstruct("_Fields", [(name, _Unread, msgspec.UNSET) for name in _NAMES]))
_tools_of = operator.attrgetter("tools", "tool_choice")
_BRACKET = ord("[")
_OF_OBJECTS = re.compile(rb"\[\s*\{")


def check(path: str, body: bytes | bytearray) -> Mapping[str, object]:
    """Check the lists of a request's body, and how many values it has; it is not kept.

    Returns:
        The fields to override, where the list of tools is empty; see `no_tools`.

    Raises:
        InvalidListError: An item is not what its list has, or there are too many; or the body is no JSON object.
        APIError: `tool_choice` demands a call, and there are no tools.
    """
    if path not in PATHS or not body:
        return {}
    try:
        fields = _FIELDS.decode(body)
        check_texts(path, fields)
        parts, counts = 0, {}
        for name, items in LISTS.get(path, {}).items():
            raw = getattr(fields, name)
            # Those of `TEXTS` may be texts, `input` of embeddings tokens as well.
            if _is_list(raw) and (name not in TEXTS.get(path, {}) or _OF_OBJECTS.match(raw)):
                counts[name], parts = _check_list(items, raw, name, parts)
        check_scored(path, body, fields, counts)
        check_values(path, body, fields, LISTS.get(path, {}))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidListError(f"The body is not one JSON object in UTF-8: {str(error)[:_SHOWN]}.") from None
    return no_tools.overrides(path, *_tools_of(fields))


def _check_list(items: _List, raw: msgspec.Raw, name: str, parts: int) -> tuple[int, int]:
    """Check a list of the body, and those within its items; return its length and the number of parts so far."""
    found = _decode(items, raw, name, 0, _BOUNDS.get(name, ITEMS))
    for index, item in enumerate(found):
        parts = _check_within(items, item, f"{name}[{index}]", parts)
    return len(found), parts


def _check_within(items: _List, item: _Object, place: str, parts: int) -> int:
    for field, inner in items.within.items():
        raw = getattr(item, field, None)  # a text has none
        if _is_list(raw):
            within = _decode(inner, raw, f"{place}.{field}", parts, PARTS)
            parts += len(within)
            for index, part in enumerate(within) if inner.within else ():
                parts = _check_within(inner, part, f"{place}.{field}[{index}]", parts)
    return parts


def _decode(items: _List, raw: msgspec.Raw, place: str, before: int, bound: int) -> list[Any]:
    _count.seen, _count.bound = before, bound
    try:
        found = items.decode(raw)
    except msgspec.ValidationError as error:
        if _count.seen > bound:
            raise _too_many(place, bound) from None
        reason, _, where = str(error).rpartition(" - at `$")
        raise InvalidListError(f"{place}{where[:-1]} is invalid: {reason[:_SHOWN]}.", _field_of(place)) from None
    if before + len(found) > bound:
        raise _too_many(place, bound)
    return found


def _field_of(place: str) -> str:
    return re.split(r"[.\[]", place, maxsplit=1)[0]


def _too_many(place: str, bound: int) -> InvalidListError:
    param = _field_of(place)
    if place == param:
        return InvalidListError(f"{place} has over {bound} items; at most {bound} are served. Send fewer.", param)
    return InvalidListError(
        f"{param} has over {bound} parts in all, counted up to {place}; at most {bound} are served. Send fewer.", param
    )


def _is_list(raw: object) -> TypeGuard[msgspec.Raw]:
    return isinstance(raw, msgspec.Raw) and memoryview(raw)[0] == _BRACKET  # a value is never empty
