"""What the lists of a body may hold, for each protocol: the rule that gateway and guard share."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest

from service.in_engine.vllm_service import http_contract
from service.in_engine.vllm_service.api_error import APIError
from service.in_engine.vllm_service.request_counts import (
    CUT_BYTES,
    DOCUMENTS,
    OTHER_VALUES,
    SCORED_BYTES,
    TEXTS,
    VALUES,
    InvalidListError,
)
from service.in_engine.vllm_service.request_lists import ITEMS, LISTS, PARTS, TOOLS, check

RESPONSES, CHAT, MESSAGES, EMBEDDINGS = "/v1/responses", "/v1/chat/completions", "/v1/messages", "/v1/embeddings"
COMPLETIONS, RERANK, SCORE, CLASSIFY = "/v1/completions", "/v1/rerank", "/v1/score", "/classify"
PROMPTS, EMBEDDED = TEXTS[COMPLETIONS]["prompt"], TEXTS[EMBEDDINGS]["input"]
USER = {"role": "user", "content": "hi"}
MANY = dict.fromkeys(map(str, range(OTHER_VALUES + 1)), 1)
FULL = {**USER, **dict.fromkeys(map(str, range(VALUES)), 1)}
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
        (EMBEDDINGS, {"input": [[0] * 1000] * EMBEDDED}),
        (EMBEDDINGS, {"input": ['a, "b" \\'] * EMBEDDED}),
        (EMBEDDINGS, {"input": [USER]}),
        (RERANK, {"query": "a", "documents": ['a, "b" [' * 100] * DOCUMENTS}),
        (RERANK, {"query": {"content": [{"type": "text", "text": "a"}]}, "documents": [{"content": [{}]}] * DOCUMENTS}),
        (RERANK, {"query": "a" * (SCORED_BYTES // 2), "documents": ["b"]}),
        (RERANK, {"query": "a", "documents": "b"}),
        (SCORE, {"queries": ["a" * 1000] * DOCUMENTS, "documents": ["b" * 900] * DOCUMENTS}),
        (SCORE, {"text_1": "a", "text_2": ["b"]}),
        (CLASSIFY, {"input": [[0] * 1000] * 2048}),
        (COMPLETIONS, {"prompt": [[0]] * PROMPTS, "input": [0], "messages": [0]}),
        (COMPLETIONS, {"prompt": [0] * 1_000_000, "n": 16}),
        (COMPLETIONS, {"prompt": ["a"] * (PROMPTS // 16), "n": 16}),
        (COMPLETIONS, {"prompt": "[a], " * 1_000_000}),
        (COMPLETIONS, {"prompt": [[], []]}),
        (RESPONSES, {"input": "hi", "instructions": "a, " * 1_000_000}),
        (CHAT, {"messages": [{"role": "user", "content": 'a, {"b": [' * 1_000_000}]}),
        (CHAT, {"messages": [USER], "logit_bias": {str(token): -1 for token in range(OTHER_VALUES - 100)}}),
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
    ("path", "fields", "words"),
    [
        (COMPLETIONS, {"prompt": ["a"] * (PROMPTS + 1)}, f"prompt has over {PROMPTS} items"),
        (COMPLETIONS, {"prompt": ['"]'] * (PROMPTS + 1)}, f"prompt has over {PROMPTS} items"),
        (COMPLETIONS, {"prompt": [[0]] * 1_000_000}, f"prompt has over {PROMPTS} items"),
        (COMPLETIONS, {"prompt": [[]] * 1_000_000}, f"prompt has over {PROMPTS} items"),
        (COMPLETIONS, {"prompt": ["a"] * 65, "n": 16}, "prompt has 65 texts, and n=16 asks for 1040 answers;"),
        (COMPLETIONS, {"prompt": ["a", 1]}, "prompt[1] is neither a text nor a list of tokens"),
        (COMPLETIONS, {"prompt": [[[1]]]}, "prompt[0] is neither a text nor a list of tokens"),
        (EMBEDDINGS, {"input": ["a"] * (EMBEDDED + 1)}, f"input has over {EMBEDDED} items"),
        (EMBEDDINGS, {"input": ["a", {}]}, "input[1] is neither a text nor a list of tokens"),
    ],
)  # fmt: skip
def test_too_many_texts_are_refused_with_the_bound(path: str, fields: dict[str, Any], words: str) -> None:
    """Each text becomes a request to the engine, and `n` of them."""
    error = refused(path, **fields)

    assert str(error).startswith(words)
    assert error.param == words.partition(" ")[0].partition("[")[0]


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        (CHAT, {"messages": [USER], "chat_template_kwargs": MANY}, "values"),
        (CHAT, {"messages": [USER], "x": [{}] * OTHER_VALUES}, "values outside of messages, tools"),
        (CHAT, {"messages": [USER], **MANY}, "values outside"),
        (CHAT, {"messages": [FULL]}, f"messages has over {VALUES} values"),
        (MESSAGES, {"messages": [USER], "metadata": {"a": [1] * OTHER_VALUES}}, "outside of messages, system, tools"),
        (COMPLETIONS, {"prompt": "a", "stop_token_ids": [1] * (OTHER_VALUES + 2)}, "values outside of prompt"),
    ],
    ids=["names", "objects", "unknown", "message", "metadata", "tokens"],
)  # fmt: skip
def test_too_many_values_are_refused_with_the_bound(path: str, fields: dict[str, Any], words: str) -> None:
    """What the engine reads value by value is bounded wherever it stands."""
    message = str(refused(path, **fields))

    assert words in message
    assert "Send fewer" in message


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
        check(RESPONSES, b'{"input":[0]}')

    assert (refusal.value.status, refusal.value.param) == (400, "input")
    assert json.loads(refusal.value.body("/v1/messages", "an-id"))["type"] == "error"
    assert set(json.loads(refusal.value.body(RESPONSES, "an-id"))) == {"error"}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (RERANK, {"query": "a" * 2500, "documents": ["b"] * 900}),
        (RERANK, {"query": "a", "documents": ["b"] * 900, "instruction": "a" * 2500}),
        (RERANK, {"query": {"content": [{"text": "a" * 2500}]}, "documents": [{"content": []}] * 900}),
        (RERANK, {"query": "a", "documents": "b" * SCORED_BYTES}),
        (SCORE, {"queries": ["a" * 2500], "documents": ["b"] * 900}),
        (SCORE, {"data_1": ["a" * 2500] * 500, "data_2": ["b" * 2500] * 500}),
    ],
)
def test_texts_to_score_are_bounded_with_what_goes_with_each_of_them(path: str, fields: dict[str, Any]) -> None:
    """A query of 2.5 KB and 900 documents of one letter are 2.3 MB to tokenize; to cut them takes longer."""
    assert f"at most {SCORED_BYTES} are scored at once. " in refused(path, **fields).message
    sent(RERANK, query="a", documents=["a" * (CUT_BYTES // 2)])
    error = refused(RERANK, query="a", documents=["a" * CUT_BYTES], max_tokens_per_doc=10)
    assert f"at most {CUT_BYTES} are scored at once with max_tokens_per_doc. " in error.message


def test_lists_of_every_route_with_a_body_are_bounded() -> None:
    """A route that is added says which lists its body has; these two have texts and tokens alone."""
    routes = (route for listed in http_contract.ROUTES.values() for route in listed.values())

    assert {route.path for route in routes if route.model_from == "body" and not route.is_form} == LISTS.keys() | {
        "/v1/completions",
        "/detokenize",
    }
