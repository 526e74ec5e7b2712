"""The lines of a batch's input: requests in JSON, one a line, each with an id of its own.

A line that is wrong stops nothing: it becomes a `BadLine`, which the error file names with its number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import msgspec

from service.in_engine.vllm_service.http_contract import BODY_LIMIT, MIB

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
MAX_LINES = 100_000  # of one batch: their ids are held in memory; OpenAI takes 50,000
LINE_LIMIT = BODY_LIMIT + 64 * 1024  # bytes: a body, and what is around it
ID_LIMIT = 512  # characters of a custom_id
_SKIPPED = MIB  # bytes of a line that is too long, read at a time


@dataclass(frozen=True, slots=True)
class Line:
    """A request.

    Attributes:
        number: Of its line in the input, from 1.
        custom_id: How its answer is known.
        url: One of `URLS`.
        body: Its JSON object.
    """

    number: int
    custom_id: str
    url: str
    body: bytes


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no request.

    Attributes:
        number: Of the line in the input, from 1.
        custom_id: What it is called, where that can be read.
        code: What is wrong, for programs.
        message: What is wrong, with the number.
    """

    number: int
    custom_id: str | None
    code: str
    message: str


class _Fields(msgspec.Struct):
    custom_id: msgspec.Raw = msgspec.Raw(b"null")
    method: msgspec.Raw = msgspec.Raw(b"null")
    url: msgspec.Raw = msgspec.Raw(b"null")
    body: msgspec.Raw = msgspec.Raw(b"null")


class _Body(msgspec.Struct):
    stream: msgspec.Raw = msgspec.Raw(b"null")


class _Named(msgspec.Struct):
    model: str | None = None


class _LineError(Exception):
    """Why a line is no request.

    Args:
        code: For programs.
        sentence: For people; the line's number is put before it.
    """

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


_FIELDS, _BODY, _TEXT = msgspec.json.Decoder(_Fields), msgspec.json.Decoder(_Body), msgspec.json.Decoder(str)
_NAMED = msgspec.json.Decoder(_Named)


def named_model(body: bytes | msgspec.Raw) -> str:
    """Return the model that a line's body names; empty: none, or it is no body."""
    try:
        return _NAMED.decode(body).model or ""
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""


def count_lines(file: BinaryIO, most: int | None = None) -> int:
    """Return how many lines of a file are not empty. Blocks.

    Args:
        file: At its beginning.
        most: With more lines, or more than twice as many with the empty ones, counting ends, and returns one more.
    """
    count = 0
    for number, raw in raw_lines(file):
        count += raw is None or bool(raw.strip())
        if most is not None and (count > most or number > 2 * most):
            return most + 1
    return count


def read_lines(file: BinaryIO, url: str | None) -> Iterator[Line | BadLine]:
    """Yield the lines of an input as they are read; empty ones are left out, but counted in the numbers. Blocks.

    Args:
        file: At its beginning.
        url: What each line must name; None: any of `URLS`.
    """
    numbers: dict[bytes, int] = {}
    for number, raw in raw_lines(file):
        if raw is not None and not raw.strip():
            continue
        custom_id: str | None = None
        try:
            fields = _fields(raw)
            custom_id = _custom_id(fields.custom_id)
            _check_unique(custom_id, number, numbers)
            yield Line(number, custom_id, _url(fields, url), _body(fields.body))
        except _LineError as error:
            yield BadLine(number, custom_id, error.code, f"Line {number}: {error}")


def raw_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yield each line with its number; None in place of one that is too long, and is never held whole."""
    number = 0
    while raw := file.readline(LINE_LIMIT + 1):
        number += 1
        if len(raw) <= LINE_LIMIT:
            yield number, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            continue
        while raw and not raw.endswith(b"\n"):
            raw = file.readline(_SKIPPED)
        yield number, None


def _fields(raw: bytes | None) -> _Fields:
    if raw is None:
        raise _LineError("line_too_long", f"it is longer than {LINE_LIMIT} bytes, which is the limit.")
    try:
        return _FIELDS.decode(raw)
    except msgspec.ValidationError:
        raise _LineError("invalid_json", "it is no JSON object.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _LineError("invalid_json", f"it is not JSON: {str(error).removeprefix('JSON is malformed: ')}.") from None
    except RecursionError:
        raise _LineError("invalid_json", "it is nested too deeply.") from None


def _custom_id(raw: msgspec.Raw) -> str:
    try:
        custom_id = _TEXT.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise _LineError(
            "invalid_custom_id", f"custom_id={_excerpt(raw)} is not a string. Write a unique one."
        ) from None
    if not 1 <= len(custom_id) <= ID_LIMIT:
        raise _LineError(
            "invalid_custom_id", f"custom_id has {len(custom_id)} characters; it must have 1 to {ID_LIMIT}."
        )
    return custom_id


def _check_unique(custom_id: str, number: int, numbers: dict[bytes, int]) -> None:
    digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()  # ids may be long
    if (first := numbers.setdefault(digest, number)) != number:
        raise _LineError("duplicate_custom_id", f"custom_id '{custom_id}' is that of line {first} too.")


def _url(fields: _Fields, wanted: str | None) -> str:
    if bytes(fields.method) != b'"POST"':
        raise _LineError("invalid_method", f'method={_excerpt(fields.method)} is not "POST".')
    try:
        url = _TEXT.decode(fields.url)
    except (msgspec.DecodeError, UnicodeDecodeError):
        url = ""
    allowed = (wanted,) if wanted else URLS
    if url not in allowed:
        code = "mismatched_url" if url in URLS else "invalid_url"
        whose = "the batch's endpoint" if wanted else "a URL of batches"
        raise _LineError(code, f"url={_excerpt(fields.url)} is not {whose}: {', '.join(allowed)}.")
    return url


def _body(raw: msgspec.Raw) -> bytes:
    try:
        body = _BODY.decode(raw)
    except msgspec.DecodeError:
        raise _LineError("invalid_body", f"body={_excerpt(raw)} is not a JSON object.") from None
    if bytes(body.stream) == b"true":
        raise _LineError("invalid_stream", "body.stream is true, and an answer in a file is no stream. Leave it out.")
    if len(found := bytes(raw)) > BODY_LIMIT:
        raise _LineError("body_too_long", f"body is {len(found)} bytes long; the limit is {BODY_LIMIT}.")
    return found


def _excerpt(raw: msgspec.Raw) -> str:
    text = bytes(memoryview(raw)[:80]).decode(errors="replace")
    return text if len(text) < 80 else f"{text}…"
