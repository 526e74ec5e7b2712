"""Lines of a batch's input: what is a request, and what is told of a line that is none."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from service.batch import lines
from service.batch.lines import BadLine, Line, count_lines, read_lines

CHAT = "/v1/chat/completions"


def line(**fields: Any) -> dict[str, Any]:
    """Return the fields of a request, with these in place of the usual ones."""
    return {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"model": "tiny"}} | fields


def read(*raw: bytes | dict[str, Any], url: str | None = CHAT) -> list[Line | BadLine]:
    """Return what is read from lines."""
    text = b"\n".join(one if isinstance(one, bytes) else json.dumps(one).encode() for one in raw)
    return [*read_lines(io.BytesIO(text), url)]


def test_request_is_read_with_its_number_id_and_body_as_it_was_written() -> None:
    """The body's bytes are not changed, and empty lines count."""
    raw = b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model":  "tiny"}}'

    assert read(b"", raw) == [Line(2, "a", CHAT, b'{"model":  "tiny"}')]


def test_byte_order_mark_and_line_ends_of_windows_are_no_part_of_a_line() -> None:
    """An editor on Windows writes both."""
    raw = b"\xef\xbb\xbf" + json.dumps(line()).encode() + b"\r\n\r\n"

    assert read(raw) == [Line(1, "a", CHAT, b'{"model": "tiny"}')]


@pytest.mark.parametrize(
    ("raw", "code", "named"),
    [
        (b"nonsense", "invalid_json", "not JSON"),
        (b"[1]", "invalid_json", "no JSON object"),
        (b"\xff\xfe", "invalid_json", "not JSON"),
        (b"[" * 100_000, "invalid_json", "Line 1"),
        (b'{"custom_id": ' + b"[" * 100_000, "invalid_json", "Line 1"),
        (line(custom_id=None), "invalid_custom_id", "null"),
        (line(custom_id=7), "invalid_custom_id", "7"),
        (line(custom_id=""), "invalid_custom_id", "0 characters"),
        (line(custom_id="x" * 513), "invalid_custom_id", "513"),
        (line(method="GET"), "invalid_method", "GET"),
        (line(url="/v1/models"), "invalid_url", "/v1/models"),
        (line(url=None), "invalid_url", "null"),
        (line(url="/v1/embeddings"), "mismatched_url", "/v1/embeddings"),
        (line(body=[1]), "invalid_body", "[1]"),
        (line(body=None), "invalid_body", "null"),
        (line(body={"stream": True}), "invalid_stream", "stream"),
    ],
)
def test_wrong_line_is_told_with_its_number_and_value(raw: bytes | dict[str, Any], code: str, named: str) -> None:
    """One error a line, and the next line is read."""
    first, second = read(raw, line(custom_id="b"))

    assert isinstance(first, BadLine)
    assert (first.number, first.code) == (1, code)
    assert first.message.startswith("Line 1: ")
    assert named in first.message
    assert isinstance(second, Line)


def test_second_line_with_an_id_names_the_first() -> None:
    """The first is answered."""
    first, second = read(line(), line())

    assert isinstance(first, Line)
    assert second == BadLine(2, "a", "duplicate_custom_id", "Line 2: custom_id 'a' is that of line 1 too.")


def test_line_without_a_batch_endpoint_may_name_any_url() -> None:
    """A command's file mixes them."""
    first, second = read(line(url="/v1/embeddings"), line(custom_id="b", url="/v1/responses"), url=None)

    assert isinstance(first, Line)
    assert isinstance(second, Line)


def test_line_that_is_too_long_is_an_error_and_those_behind_it_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rest is skipped piece by piece."""
    monkeypatch.setattr(lines, "LINE_LIMIT", 200)
    monkeypatch.setattr(lines, "_SKIPPED", 64)

    first, second = read(line(body={"a": "x" * 1000}), line(custom_id="b"))

    assert isinstance(first, BadLine)
    assert (first.number, first.code) == (1, "line_too_long")
    assert isinstance(second, Line)
    assert second.number == 2


def test_count_is_that_of_lines_that_are_not_empty() -> None:
    """The last line needs no end."""
    assert count_lines(io.BytesIO(b"a\n\n  \nb")) == 2


@pytest.mark.parametrize("text", [b"a\n" * 4, b"\n" * 7, b"a\n\n" * 3 + b"\n"])
def test_counting_ends_at_the_limit(text: bytes) -> None:
    """Also among empty lines, of which a file of 2 GiB may have two thousand million."""
    file = io.BytesIO(text + b"\n" * 1000)

    assert count_lines(file, 3) == 4
    assert file.tell() <= len(text)
    assert count_lines(io.BytesIO(b"a\n\n" * 3), 3) == 3
