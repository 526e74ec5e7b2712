"""How many values a request's body may have, and how many requests to the engine it may become.

vLLM reads a body value by value on the event loop that serves all requests. CPU time of vLLM 0.32's API process for
1,000,000 names: in `chat_template_kwargs` 8.5 s, in a message 2.2 s, in `metadata` of /v1/responses 2 s, in
`kv_transfer_params` 1.6 s, in `logit_bias` 1.3 s, in fields that nobody knows 0.9 s; 10,000,000 empty objects take
1.4 s wherever they stand, 10,000,000 tokens 0.6 s. So tokens are bounded by the body's limit alone.

Each text of `prompt`, or of `input` of embeddings, becomes a request to the engine, `n` times; so does each document,
with its query.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from . import json_counts
from .api_error import APIError
from .http_contract import MIB

VALUES = 250_000  # in the messages, the items, the system texts or the tools of a body
OTHER_VALUES = 50_000  # in all other fields together
DOCUMENTS = 1024  # of which each becomes a request to the engine, with its query
# Of all queries and documents, pair by pair: vLLM tokenizes them one after the other, whatever their length. Another
# client's request waited 12.8 s on a busy machine for 4 MiB that were cut to so many tokens, without that 1 s.
SCORED_BYTES, CUT_BYTES = 2 * MIB, MIB // 2
_CUTS = ("max_tokens_per_doc", "max_tokens_per_query")
# The fields of scores: vLLM takes several pairs of names, each a text, an object with parts, or a list of these.
_SCORED = ("queries", "documents", "items", "data_1", "data_2", "text_1", "text_2")
SCORED: Mapping[str, tuple[str, ...]] = {"/v1/rerank": ("query", "documents"), "/v1/score": _SCORED}
# path -> fields and how many texts each may have: as vLLM's own bound on prompts, and as OpenAI's on embeddings
TEXTS: Mapping[str, Mapping[str, int]] = {
    "/v1/completions": {"prompt": 1024},
    "/v1/embeddings": {"input": 2048},
    "/classify": {"input": 2048},
    **{path: dict.fromkeys(names, DOCUMENTS) for path, names in SCORED.items()},
}
# the fields that these checks read
COUNTED = ("input", "instructions", "n", "prompt", "system", "query", *_CUTS, *_SCORED)


class InvalidListError(APIError):
    """The body is not to reach the engine.

    Args:
        message: What, the actual value, what was expected.
        param: The field of the body; None for the body itself.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(400, message, code="invalid_value", param=param)


def check_texts(path: str, fields: Any) -> None:
    """Check how many requests to the engine each list of texts becomes.

    Args:
        path: The route's.
        fields: Its `COUNTED` fields, each `msgspec.Raw` or unset.

    Raises:
        InvalidListError: They are too many.
    """
    for name, most in TEXTS.get(path, {}).items():
        raw = getattr(fields, name)
        if isinstance(raw, msgspec.Raw) and json_counts.is_list_of_texts(raw):
            _check_list_of_texts(name, raw, most, fields)


def _check_list_of_texts(name: str, raw: msgspec.Raw, most: int, fields: Any) -> None:
    count, has_others = json_counts.texts(raw, most)
    if has_others:
        raise InvalidListError(f"{name}[{count}] is neither a text nor a list of tokens, as those before are.", name)
    if count > most:
        raise InvalidListError(f"{name} has over {most} items; at most {most} are served. Send fewer.", name)
    if count * (n := _number(fields.n)) > most:
        raise InvalidListError(
            f"{name} has {count} texts, and n={n:g} asks for {count * n:g} answers; at most {most} in all are served. "
            "Send fewer texts, or lower n.",
            name,
        )


def check_scored(path: str, body: bytes | bytearray, fields: Any, counts: Mapping[str, int]) -> None:
    """Check how many bytes vLLM tokenizes to score texts: what stands once in a body goes with every document.

    Args:
        path: The route's.
        body: All of it.
        fields: Its `COUNTED` fields, each `msgspec.Raw` or unset.
        counts: How many items those have that are lists of objects.

    Raises:
        InvalidListError: They are too many.
    """
    if path not in SCORED:
        return
    lists, most = 0, 1
    for name in SCORED[path]:
        raw = getattr(fields, name)
        if not isinstance(raw, msgspec.Raw) or bytes(memoryview(raw)[:1]) != b"[":
            continue
        count = counts[name] if name in counts else json_counts.texts(raw, DOCUMENTS)[0]
        if count > 1:
            lists, most = lists + len(memoryview(raw)), max(most, count)
    size, cuts = (
        lists + most * (len(body) - lists),
        [name for name in _CUTS if getattr(fields, name) is not msgspec.UNSET],
    )
    limit = CUT_BYTES if cuts else SCORED_BYTES
    if size > limit:
        raise InvalidListError(
            f"The texts have {size} bytes, with what goes with each of the {most} documents again; at most {limit} are "
            f"scored at once{f' with {cuts[0]}' if cuts else ''}. Send fewer or shorter documents, or a shorter query.",
            "documents" if path == "/v1/rerank" else None,
        )


def _number(raw: msgspec.Raw | msgspec.UnsetType) -> float:
    """Return a number; 1 where there is none, or no number: vLLM says what is wrong with it."""
    try:
        return 1 if isinstance(raw, msgspec.UnsetType) else msgspec.json.decode(raw, type=float)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 1


def check_values(path: str, body: bytes | bytearray, fields: Any, lists: Collection[str]) -> None:
    """Check how many values each list has, and all other fields together; tokens and texts are no part of it.

    Args:
        path: The route's.
        body: All of it.
        fields: The fields in `lists`, and the `COUNTED` ones, each `msgspec.Raw` or unset.
        lists: Names of its lists of objects.

    Raises:
        InvalidListError: They are too many.
    """
    others = json_counts.separators(body) if len(body) > OTHER_VALUES else 0
    if others <= OTHER_VALUES:
        return
    of_texts = TEXTS.get(path, {})
    for name in {*COUNTED, *lists}:
        raw, is_list = getattr(fields, name), name in lists or name in of_texts
        if isinstance(raw, msgspec.Raw) and (is_list or bytes(memoryview(raw)[:1]) == b'"'):
            others -= json_counts.separators(raw)
            is_counted = is_list and (name not in of_texts or not json_counts.is_list_of_numbers(raw))
            if is_counted and json_counts.has_over(VALUES, raw):
                message = f"{name} has over {VALUES} values; at most {VALUES} are served. Send fewer."
                raise InvalidListError(message, name)
    if others > OTHER_VALUES:
        known = ", ".join(sorted({*lists, *of_texts}))
        raise InvalidListError(
            f"The body has about {others} values outside of {known}; at most {OTHER_VALUES} are served. Send fewer."
        )
