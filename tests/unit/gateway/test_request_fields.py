"""The fields that the gateway reads of a body, what it refuses, and how it sets a field without a copy."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from service.gateway import request_fields
from service.gateway.request_fields import CONSTRAINT_LIMIT, MAX_N, REMOVED_FIELDS, TOOLS_LIMIT
from service.in_engine.vllm_service.api_error import APIError
from service.in_engine.vllm_service.form_data import NAME_LIMIT
from service.in_engine.vllm_service.overrides import with_overrides

ROOT = Path(__file__).parents[3]
IMAGE = b'{"messages":[{"content":[{"image_url":{"url":"data:image/png;base64,' + b"iVBORw0K" * 1_310_720 + b'"}}]}],'
IMAGE += b'"model":"gemma-3-12b","stream":true}'


def refused(body: bytes) -> APIError:
    """Return the error that a body is refused with."""
    with pytest.raises(APIError) as caught:
        request_fields.parse_fields(body)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_body_in_any_buffer_is_read(kind: Any) -> None:
    """The fields are read from every type of buffer."""
    asked = request_fields.parse_fields(
        kind(b' {"n": 2, "model": "qwen3-8b", "x": {"model": "no"}, "stream": true, "best_of": 3}\n')
    )

    assert (asked.model, asked.stream, asked.n, asked.best_of) == ("qwen3-8b", True, 2, 3)
    assert not asked.constraints
    assert not asked.has_tools


def test_body_without_the_fields_sets_none() -> None:
    """Null counts as absent."""
    asked = request_fields.parse_fields(
        b'{"model":null,"stream":null,"n":null,"tools":null,"response_format":null,"guided_json":null}'
    )

    assert asked == request_fields.RequestFields()


@pytest.mark.parametrize(
    ("tools", "has_tools"), [("[]", False), ("[ \n ]", False), ("null", False), ('[{"a":1}]', True)]
)
def test_tools_are_there_when_one_is(tools: str, has_tools: bool) -> None:
    """An empty list is none."""
    assert request_fields.parse_fields(f'{{"tools":{tools}}}'.encode()).has_tools is has_tools


def test_fields_that_are_set_are_distinguished_from_absent_ones() -> None:
    """A temperature of 0 is set; null is not."""
    asked = request_fields.parse_fields(b'{"temperature":0,"tool_choice":null}')

    assert asked.sets("temperature")
    assert not asked.sets("tool_choice")


def test_request_fields_keep_no_body_alive() -> None:
    """Otherwise each stream would hold a body of up to ten megabytes until its end."""
    body = bytearray(b'{"model":"x","response_format":{"type":"text"},"tools":[{"type":"function"}]}')
    asked = request_fields.parse_fields(body)
    body.clear()  # a view would forbid it

    assert asked.constraints == {"response_format": b'{"type":"text"}', "tools": b'[{"type":"function"}]'}


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":5,"stream":7,"model":"last","stream":false}',
        b'{"mod\\u0065l":"escaped"}',
        b'{"model":"first","mod\\u0065l":"escaped"}',
        b'{"\\u006d\\u006F\\u0064\\u0065\\u006C":"first","model":"last"}',
        b'{"model\\u0000":"no","model ":"no","Model":"no"}',
        b'{"a":{"model":"no"},"b":["model"],"model":"caf\\u00e9 \\ud83d\\ude00 \\"x\\" \\/"}',
        '{"model":"日本"}'.encode(),
        b'{"model":null,"stream":null}',
        b'{"model":"x","model":null}',
        b"{}",
    ],
)
def test_body_with_any_keys_is_read_as_python_reads_it(body: bytes) -> None:
    """The engine parses with json.loads: the gateway must read the same values."""
    asked, read = request_fields.parse_fields(body), json.loads(body)

    assert (asked.model, asked.stream) == (read.get("model"), read.get("stream"))


def test_bodies_at_random_are_read_as_python_reads_them() -> None:
    """Duplicates, escapes and white space in any order, the last of each name counts."""
    draw = random.Random(7)  # noqa: S311 - the same in every run
    for _ in range(2000):
        pairs = [pair(draw) for _ in range(draw.randint(0, 6))]
        body = f"{space(draw)}{{{','.join(pairs)}{space(draw)}}}{space(draw)}".encode()
        asked, read = request_fields.parse_fields(body), json.loads(body)
        assert (asked.model, asked.stream, asked.n) == tuple(map(read.get, ("model", "stream", "n")))


def pair(draw: random.Random) -> str:
    """Return a key and a value, the key with some letters escaped."""
    name, value = draw.choice(
        [("model", '"a\\u0062"'), ("model", '"\\n"'), ("stream", "true"), ("n", "3"), ("x", "[{}]")]
    )
    key = "".join(f"\\u{ord(letter):04x}" if draw.random() < 0.2 else letter for letter in name)
    return f'{space(draw)}"{key}"{space(draw)}:{space(draw)}{value}{space(draw)}'


def space(draw: random.Random) -> str:
    """Return white space of JSON."""
    return "".join(draw.choices(" \t\r\n", k=draw.randint(0, 2)))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "too soon, after 0 bytes"),
        (b'{"model":"x"', "too soon, after 12 bytes"),
        (b"model=x", "byte 0"),
        (b'{"a":1,}', "byte 7"),
        (b'{"a":NaN}', "byte 5"),
        (b'{"a":1}{', "byte 8"),
        (b'{"a":"\\ud800"}', "second half"),
        (b"[1]", "type array"),
        (b'"text"', "type str"),
        (b"null", "type null"),
        (b'{"a":' + b"[" * 100_000, "too deeply"),
        (b'{"a":' + b'{"a":' * 100_000, "too deeply"),
    ],
)
def test_body_that_is_no_json_object_is_refused_with_the_position(body: bytes, words: str) -> None:
    """A body that the engine cannot parse does not reach it."""
    api_error = refused(body)

    assert words in api_error.message
    assert api_error.code == "invalid_json"


@pytest.mark.parametrize("value", ["5", "true", '["x"]', '{"a":"x"}', "1.5"])
def test_model_that_is_no_string_is_refused(value: str) -> None:
    """The error contains the value."""
    api_error = refused(f'{{"model":{value}}}'.encode())

    assert api_error.param == "model"
    assert value in api_error.message


def test_model_longer_than_any_name_is_refused_without_its_text() -> None:
    """A search for the nearest names of ten megabytes would not end."""
    api_error = refused(b'{"model":"' + b"x" * NAME_LIMIT + b'"}')

    assert "xxx" not in api_error.message


@pytest.mark.parametrize("value", ["1", "0", '"true"', "[]"])
def test_stream_that_is_no_boolean_is_refused(value: str) -> None:
    """Whether an answer is streamed decides how it is forwarded."""
    assert refused(f'{{"stream":{value}}}'.encode()).param == "stream"


@pytest.mark.parametrize("name", ["n", "best_of"])
@pytest.mark.parametrize("value", ["0", "-1", str(MAX_N + 1), "1.5", "1e3", '"2"', "true", "[2]", "9" * 100_000])
def test_count_outside_its_bound_is_refused(name: str, value: str) -> None:
    """One request would cost as much as thousands."""
    api_error = refused(f'{{"{name}":{value}}}'.encode())

    assert api_error.param == name
    assert f"1 to {MAX_N}" in api_error.message
    assert len(api_error.message) < 200


@pytest.mark.parametrize("name", ["n", "best_of"])
@pytest.mark.parametrize("value", ["1", "1.0", "1e1", str(MAX_N)])
def test_count_at_its_bound_passes(name: str, value: str) -> None:
    """The bound itself is allowed, and a number without a fraction is an integer however it is written."""
    assert getattr(request_fields.parse_fields(f'{{"{name}":{value}}}'.encode()), name) == float(value)


def test_count_above_its_bound_is_told_the_setting() -> None:
    """What pass@k takes: 20 to 200 answers to one request."""
    assert request_fields.parse_fields(b'{"n":200}', 200).n == 200
    assert "raise SERVICE_MAX_N (16; at most 200)" in refused(b'{"n":20}').message


@pytest.mark.parametrize("name", sorted(REMOVED_FIELDS))
def test_removed_field_is_refused_with_its_replacement(name: str) -> None:
    """The engine accepts and ignores it."""
    api_error = refused(f'{{"model":"x","{name}":{{"type":"object"}}}}'.encode())

    assert (api_error.param, api_error.code) == (name, "unsupported_parameter")
    assert "structured_outputs" in api_error.message or "Leave it out" in api_error.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("response_format", '{"type":"' + "x" * CONSTRAINT_LIMIT + '"}'),
        ("structured_outputs", '{"regex":"' + "x" * CONSTRAINT_LIMIT + '"}'),
        ("tools", '["' + "x" * TOOLS_LIMIT + '"]'),
    ],
)
def test_constraint_over_its_size_is_refused(name: str, value: str) -> None:
    """It would be copied and compiled."""
    api_error = refused(f'{{"{name}":{value}}}'.encode())

    assert (api_error.param, api_error.code) == (name, "invalid_grammar")


@pytest.mark.parametrize("value", ['"text"', "3", "true"])
def test_field_of_the_same_name_that_is_no_constraint_is_left_to_the_engine(value: str) -> None:
    """Other routes may have a text, of any length."""
    assert not request_fields.parse_fields(f'{{"text":{value},"tools":{value}}}'.encode()).constraints


def test_body_with_a_large_image_is_read_without_memory_for_it() -> None:
    """Ten megabytes of base64 are skipped: no Python object is made of them."""
    tracemalloc.start()
    asked = request_fields.parse_fields(IMAGE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert (asked.model, asked.stream) == ("gemma-3-12b", True)
    assert peak < 100_000


def test_body_with_a_large_image_is_read_and_overridden_where_no_copy_fits() -> None:
    """The process may allocate less than the body's size, so that a copy would be a MemoryError."""
    program = """
import resource
from service.gateway import request_fields as bodies
from service.in_engine.vllm_service.overrides import with_overrides
from tests.unit.gateway.test_request_fields import IMAGE
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4_000_000,) * 2)
first, second = with_overrides(IMAGE, {"model": bodies.parse_fields(IMAGE).model + "-h100"})
try:
    bytearray(IMAGE)
except MemoryError:
    print(len(first) - len(IMAGE), second.decode())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout == '-1 ,"model":"gemma-3-12b-h100"}\n'


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b" { \n } \n",
        b'{"model":"old"}',
        b'{"a":{}}',
        b'{"a":{ } } \r\n\t ',
        b'{"a":"}"}',
        b'{"temperature":1,"model":"a","mod\\u0065l":"b"}',
        b"{}" + b" " * 1_000_000,
        b'{"a":1' + b" " * 1_000_000 + b"}",
    ],
)
@pytest.mark.parametrize("changes", [{"model": 'né"w'}, {"temperature": 0.3, "tool_choice": "auto"}, {}])
def test_overridden_body_has_the_overrides_and_everything_else(body: bytes, changes: dict[str, Any]) -> None:
    """Fields that are added at the end win."""
    for buffer in (body, bytearray(body)):
        first, second = with_overrides(buffer, changes)
        assert json.loads(bytes(first) + second) == {**json.loads(body), **changes}
        assert first.obj is buffer
