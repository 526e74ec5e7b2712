"""What the lists of a body may hold, for each protocol: the rule that gateway and guard share."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest

from service.gateway import request_fields
from service.gateway.api_errors import APIError
from service.in_engine.vllm_service import http_contract
from service.in_engine.vllm_service.request_lists import ITEMS, LISTS, PARTS, TOOLS, InvalidListError, check

RESPONSES, CHAT, MESSAGES, EMBEDDINGS = "/v1/responses", "/v1/chat/completions", "/v1/messages", "/v1/embeddings"
USER = {"role": "user", "content": "hi"}
MIB = 1024 * 1024


def sent(path: str, **fields: Any) -> None:
    """Check a body of these fields."""
    check(path, json.dumps(fields).encode())


def refused(path: str, **fields: Any) -> InvalidListError:
    """Return why a body of these fields is refused."""
    with pytest.raises(InvalidListError) as error:
        sent(path, **fields)
    return error.value


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (RESPONSES, {"input": "hi"}),
        (RESPONSES, {"input": None, "tools": None}),
        (RESPONSES, {"input": [USER] * ITEMS}),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}, {"id": "item_1"}]}),
        (RESPONSES, {"input": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}]}]}),
        (RESPONSES, {"input": [{"type": "shell_call_output", "output": [{"stdout": "", "stderr": ""}]}]}),
        (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "1", "output": "[0]"}]}),
        (CHAT, {"messages": [USER] * ITEMS, "tools": [{}] * TOOLS}),
        (CHAT, {"messages": [{"role": "ipython", "content": ["a", {"image_url": "x"}]}, {"role": "assistant"}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{}] * PARTS}]}),
        (CHAT, {"messages": [{"role": "user", "content": ["a"] * PARTS}]}),
        (MESSAGES, {"messages": [USER], "system": [{"type": "text", "text": "x"}]}),
        (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [{"a": 1}]}]}]}),
        (EMBEDDINGS, {"input": [0] * 100_000}),
        (EMBEDDINGS, {"input": [[0]] * 100_000}),
        (EMBEDDINGS, {"input": ["a"] * 100_000}),
        (EMBEDDINGS, {"input": [USER]}),
        ("/v1/completions", {"prompt": [[0]] * 100_000, "input": [0], "messages": [0]}),
    ],
)  # fmt: skip
def test_list_that_an_engine_serves_passes(path: str, fields: dict[str, Any]) -> None:
    """Texts, tokens, messages of any role in chat, parts that are strings, and as many items as the bound."""
    sent(path, **fields)


@pytest.mark.parametrize(
    ("path", "fields", "place"),
    [
        (RESPONSES, {"input": [{}] * 10_000}, "input[0] "),
        (RESPONSES, {"input": [0] * 100_000}, "input[0] "),
        (RESPONSES, {"input": [USER, USER, {"type": "x"}, 0]}, "input[2].type "),
        (RESPONSES, {"input": [{"role": "x", "content": "hi"}]}, "input[0].role "),
        (RESPONSES, {"input": [USER, {"role": "user", "content": [{"type": "a"}, {}]}]}, "input[1].content[1] "),
        (RESPONSES, {"input": [{"type": "reasoning", "summary": [0]}]}, "input[0].summary[0] "),
        (RESPONSES, {"input": "hi", "tools": [{}, 0]}, "tools[1] "),
        (CHAT, {"messages": [USER, {}]}, "messages[1] "),
        (CHAT, {"messages": [{"role": 5}]}, "messages[0].role "),
        (CHAT, {"messages": [{"role": "user", "content": ["a", 0]}]}, "messages[0].content[1] "),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [0]}]}, "messages[0].tool_calls[0] "),
        (CHAT, {"messages": [], "tools": ["a"]}, "tools[0] "),
        (MESSAGES, {"messages": [{"role": "tool"}]}, "messages[0].role "),
        (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "x"}]}]}, "messages[0].content[0].type "),
        (MESSAGES, {"messages": [USER], "system": [{}]}, "system[0] "),
        (f"{MESSAGES}/count_tokens", {"messages": [0]}, "messages[0] "),
        (EMBEDDINGS, {"input": [{}]}, "input[0] "),
        (EMBEDDINGS, {"messages": [{}]}, "messages[0] "),
        ("/tokenize", {"messages": [{}]}, "messages[0] "),
    ],
)  # fmt: skip
def test_first_bad_item_is_named(path: str, fields: dict[str, Any], place: str) -> None:
    """The error starts with its list, its index, and what of it is wrong."""
    error = refused(path, **fields)

    assert str(error).startswith(place)
    assert error.param == place.partition("[")[0]


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        (RESPONSES, {"input": [USER] * (ITEMS + 1)}, ("input", ITEMS)),
        (CHAT, {"messages": [USER] * (ITEMS + 1)}, ("messages", ITEMS)),
        (CHAT, {"messages": [], "tools": [{}] * (TOOLS + 1)}, ("tools", TOOLS)),
        (CHAT, {"messages": [{"role": "user", "content": ["a"] * 30_000}] * 2}, ("messages[1].content", PARTS)),
        (CHAT, {"messages": [{"role": "user", "content": [{}] * 30_000}] * 2}, ("messages[1].content", PARTS)),
        (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "text"}] * (PARTS + 1)}]}, ("messages", PARTS)),
        (MESSAGES, {"messages": [USER], "system": [{"type": "text"}] * (PARTS + 1)}, ("system", PARTS)),
    ],
)
def test_too_many_items_are_refused_with_the_bound(path: str, fields: dict[str, Any], words: tuple[str, int]) -> None:
    """Parts are counted over all messages; decoding ends at the bound."""
    message = str(refused(path, **fields))

    assert words[0] in message
    assert f"over {words[1]} " in message


@pytest.mark.parametrize(
    "body",
    [
        b'{"inp\\u0075t":[{}]}',
        b'{"input":"hi","input":[{}]}',
        b'{"input":[{"ty\\u0070e":"x"}]}',
        b'{"x":NaN,"input":[{}]}',
        b'{"input":[{"role":"\xff"}]}',
        b'\xef\xbb\xbf{"input":[{}]}',
        '{"input":[{}]}'.encode("utf-16"),
        b'[{"input":[{}]}]',
        b'{"input":' + b"[" * 100_000,
    ],
)
def test_bad_list_is_found_however_the_body_is_written(body: bytes) -> None:
    """The engine's reader takes escaped names, the last of a name, NaN, a byte order mark and UTF-16."""
    with pytest.raises(InvalidListError):
        check(RESPONSES, body)


@pytest.mark.parametrize("path", sorted(LISTS))
@pytest.mark.parametrize("item", [b"0,", b"{},", b'"a",', b'{"role":"user"},', b'{"role":"user","content":[{}]},'])
def test_body_full_of_items_costs_no_memory(path: str, item: bytes) -> None:
    """No tree is built of what is refused, nor of the values of what is not."""
    body = b'{"%s":[' % next(iter(LISTS[path])).encode() + item * (4 * MIB // len(item)) + b"{}]}"
    tracemalloc.start()
    with pytest.raises(InvalidListError):
        check(path, body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 4 * MIB


def test_value_of_the_client_is_shown_in_part() -> None:
    """An answer is no copy of 32 MiB."""
    assert len(str(refused(RESPONSES, input=[{"type": "x" * MIB}]))) < 300


def test_gateway_refuses_a_bad_list_with_its_field() -> None:
    """The gateway's own error, before a pool is asked."""
    with pytest.raises(APIError) as refusal:
        request_fields.check_lists(RESPONSES, b'{"input":[0]}')

    assert (refusal.value.status, refusal.value.param) == (400, "input")
    assert json.loads(refusal.value.body("/v1/messages"))["type"] == "error"
    assert set(json.loads(refusal.value.body(RESPONSES))) == {"error"}


def test_lists_of_every_route_with_a_body_are_bounded() -> None:
    """A route that is added says which lists its body has; these two have texts and tokens alone."""
    routes = (route for listed in http_contract.ROUTES.values() for route in listed.values())

    assert {route.path for route in routes if route.model_from == "body"} == LISTS.keys() | {
        "/v1/completions",
        "/detokenize",
    }
