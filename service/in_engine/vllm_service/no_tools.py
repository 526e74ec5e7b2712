"""A request without tools: no list, null and an empty list mean the same, whatever the protocol.

Clients send all three, with the `tool_choice` that they always send. On chat vLLM 0.32 refuses `"tools": []` and,
without tools, `"tool_choice": "auto"`; on Responses it refuses null for both. A choice that demands a call cannot be
met: OpenAI and Anthropic refuse it, and vLLM ignores it on `/v1/messages`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from .api_error import APIError

_EMPTY = re.compile(rb"\[\s*\]|null")
_FREE = (None, "auto", "none")
# What vLLM takes as "no tools" on each route, and as "no choice".
_ABSENT: Mapping[str, Mapping[str, object]] = {
    "/v1/chat/completions": {"tools": None, "tool_choice": None},
    "/v1/responses": {"tools": [], "tool_choice": "auto"},
    "/v1/messages": {},
    "/v1/messages/count_tokens": {},
}
_NOTHING: Mapping[str, object] = {}


def overrides(path: str, tools: Any, tool_choice: Any) -> Mapping[str, object]:
    """Return the fields with which vLLM takes a request without tools; none, if it has tools or needs no change.

    Args:
        path: The route's.
        tools: The field's JSON as `msgspec.Raw`, or unset.
        tool_choice: Likewise.

    Raises:
        APIError: 400: `tool_choice` demands a call.
    """
    if tools is msgspec.UNSET and tool_choice is msgspec.UNSET:
        return _NOTHING
    absent = _ABSENT.get(path)
    if absent is None or (tools is not msgspec.UNSET and not _EMPTY.fullmatch(tools)):
        return _NOTHING
    if tool_choice is not msgspec.UNSET:
        _check(tool_choice)
    given = {"tools": tools, "tool_choice": tool_choice}
    return {name: value for name, value in absent.items() if given[name] is not msgspec.UNSET}


def _check(tool_choice: msgspec.Raw) -> None:
    try:
        choice = msgspec.json.decode(tool_choice)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return  # vLLM says what is wrong with it
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if isinstance(choice, str | dict) and kind not in _FREE:
        raise APIError(
            400,
            f"tool_choice={bytes(tool_choice)[:80].decode(errors='replace')} demands a call of a tool, and the request "
            "has no tools. Send tools, or leave tool_choice out.",
            code="invalid_value",
            param="tool_choice",
        )
