"""The input of `vllm-service batch` as lines of a batch: OpenAI's lines, bodies of requests, or rows and a prompt.

What is wrong with the whole file is an error before anything is sent; a line that is wrong is a `BadLine`.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import msgspec

from service.batch.lines import BadLine, Line, count_lines, raw_lines, read_lines
from service.cli import batch_rows
from service.cli.batch_rows import Row, Template
from service.errors import UsageError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
Form = Literal["openai", "bodies", "objects", "table"]
_OPENAI = {"custom_id", "method", "url", "body"}
_OF_BODIES = {"messages": CHAT, "prompt": COMPLETIONS}
_HEAD = 64 * 1024  # bytes of a line in which its keys are looked for
_NOT_TEXT = (b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b", b"PK\x03\x04", b"PAR1")  # UTF-16, gzip, ZIP (Excel's too), Parquet
_BODY = msgspec.json.Decoder(dict[str, msgspec.Raw])


@dataclass(frozen=True)
class Request:
    """What makes requests of the lines.

    Attributes:
        prompt: Of each row; None: lines are requests already.
        system: The system prompt of each row.
        schema: JSON schema of the answers.
        fields: Of every body, in place of its own.
    """

    prompt: Template | None = None
    prompt_text: str = ""
    system: str = ""
    schema: Mapping[str, Any] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    def all_fields(self) -> dict[str, Any]:
        """Return what every body gets, the schema included."""
        if self.schema is None:
            return dict(self.fields)
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": self.schema, "strict": True}}
        return {"response_format": form, **self.fields}


class BatchInput:
    """A file of requests.

    Args:
        path: The file.
        request: What makes requests of its lines.

    Attributes:
        form: What its lines are.
        columns: Of a table.

    Raises:
        UsageError: It cannot be read, is no text, is empty, or does not go with the options.
    """

    def __init__(self, path: Path, request: Request) -> None:
        self.path, self._request = path, request
        self._fields = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in request.all_fields().items()}
        with self.open() as file:
            self.form = self._form(_first_line(file, path))
        self.columns: list[str] = []
        if self.form == "table":
            with self.open() as file:
                self.columns = batch_rows.header(file, path)
            if request.prompt:
                request.prompt.check(self.columns)

    def open(self) -> BinaryIO:
        """Open it.

        Raises:
            UsageError: That is not possible.
        """
        try:
            if self.path.is_dir():
                raise UsageError(f"'{self.path}' is a directory.", hint="Name a file of requests.")
            return self.path.open("rb", buffering=1 << 20)
        except OSError as error:
            raise UsageError(
                f"'{self.path}' cannot be read: {error.strerror}.", hint="Name a file that exists and you may read."
            ) from error

    def count(self) -> int:
        """Return how many lines of the batch it has. Blocks.

        Raises:
            UsageError: None.
        """
        with self.open() as file:
            count = sum(1 for _ in self._rows(file)) if self.form == "table" else count_lines(file)
        if not count:
            raise UsageError(f"'{self.path}' has no row.", hint="Write at least one after the line of columns.")
        return count

    def digest(self) -> str:
        """Return what tells this file and these options from others. Blocks."""
        options = [self._request.prompt_text, self._request.system, self._request.all_fields()]
        with self.open() as file:
            found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=6))  # type: ignore[arg-type]
        found.update(json.dumps(options, sort_keys=True).encode())
        return found.hexdigest()

    def lines(self) -> Iterator[Line | BadLine]:
        """Yield its lines. Blocks."""
        with self.open() as file:
            if self.form in {"table", "objects"}:
                yield from self._requests_of(self._rows(file))
                return
            source = file if self.form == "openai" else _Bodies(file)
            for line in read_lines(cast("BinaryIO", source), None):
                yield with_fields(line, self._fields) if isinstance(line, Line) else line

    def rows(self) -> Iterator[Row | BadLine]:
        """Yield the rows of a table. Blocks."""
        with self.open() as file:
            yield from self._rows(file)

    def _form(self, first: bytes) -> Form:
        if batch_rows.is_table(self.path):
            if not self._request.prompt:
                raise UsageError(
                    f"'{self.path}' is a table, and no prompt was given.",
                    hint='For example: --prompt "Summarise {text}".',
                )
            return "table"
        if self._request.prompt:
            return "objects"
        keys = set[str]()
        with suppress(ValueError):
            keys = set(_BODY.decode(first))
        return "bodies" if keys and not keys & _OPENAI else "openai"

    def _rows(self, file: BinaryIO) -> Iterator[Row | BadLine]:
        return batch_rows.table_rows(file, self.path) if self.form == "table" else batch_rows.json_rows(file)

    def _requests_of(self, rows: Iterable[Row | BadLine]) -> Iterator[Line | BadLine]:
        seen = set[bytes]()
        for row in rows:
            if isinstance(row, BadLine):
                yield row
                continue
            try:
                line = self._request_of(row)
            except KeyError as error:
                why = f"Line {row.number}: it has no field {error}, which --prompt names."
                yield BadLine(row.number, None, "missing_field", why)
                continue
            except UnicodeEncodeError:
                why = f"Line {row.number}: it has half of a surrogate pair, which no text in UTF-8 can have."
                yield BadLine(row.number, None, "invalid_json", why)
                continue
            digest = hashlib.blake2b(line.custom_id.encode(), digest_size=16).digest()
            if digest in seen:
                why = f"Line {row.number}: custom_id '{line.custom_id}' is that of an earlier line too."
                yield BadLine(row.number, line.custom_id, "duplicate_custom_id", why)
                continue
            seen.add(digest)
            yield line

    def _request_of(self, row: Row) -> Line:
        request, custom_id = self._request, row.fields.get("custom_id")
        custom_id = custom_id if isinstance(custom_id, str) and custom_id else f"line-{row.number}"
        custom_id.encode()
        system = [{"role": "system", "content": request.system}] if request.system else []
        prompt = request.prompt.filled(row) if request.prompt else ""
        messages = [*system, {"role": "user", "content": prompt}]
        return Line(row.number, custom_id, CHAT, msgspec.json.encode({"messages": messages, **self._fields}))


def with_fields(line: Line, fields: Mapping[str, msgspec.Raw]) -> Line | BadLine:
    """Return a line whose body has these fields, in place of its own; a body that is no UTF-8 is a bad line."""
    if not fields:
        return line
    try:
        body = msgspec.json.encode({**_BODY.decode(line.body), **fields})
    except (msgspec.DecodeError, UnicodeDecodeError):
        why = f"Line {line.number}: body is no JSON object in UTF-8."
        return BadLine(line.number, line.custom_id, "invalid_body", why)
    return Line(line.number, line.custom_id, line.url, body)


def model_of(line: Line) -> str | None:
    """Return the model that a line's body names."""
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        name = msgspec.json.decode(_BODY.decode(line.body).get("model", msgspec.Raw(b"null")))
        return name if isinstance(name, str) else None
    return None


def for_model(lines: Iterable[Line | BadLine], key: str, is_same: Callable[[str], bool]) -> Iterator[Line | BadLine]:
    """Yield lines for the one model that answers them all; a line that names another one is a `BadLine`.

    Args:
        lines: As they were read.
        key: Of the model.
        is_same: Whether a name is one of this model's.
    """
    fields = {"model": msgspec.Raw(msgspec.json.encode(key))}
    for line in lines:
        if isinstance(line, Line) and (name := model_of(line)) and not is_same(name):
            why = (
                f"Line {line.number}: model '{name}' is not '{key}', which answers this batch. Run the command once "
                "for each model, with --model."
            )
            yield BadLine(line.number, line.custom_id, "model_not_found", why)
        else:
            yield with_fields(line, fields) if isinstance(line, Line) else line


def read_schema(path: Path) -> dict[str, Any]:
    """Return a JSON schema of objects.

    Raises:
        UsageError: The file has none.
    """
    hint = 'It is an object such as {"type": "object", "properties": {"sentiment": {"type": "string"}}}.'
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"--schema '{path}' cannot be read: {error.strerror}.", hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--schema '{path}' is not JSON: {error}.", hint=hint) from error
    if not isinstance(found, dict) or found.get("type") != "object" or not isinstance(found.get("properties"), dict):
        raise UsageError(f"--schema '{path}' is no JSON schema of an object with properties.", hint=hint)
    return found


def read_fields(given: Iterable[str]) -> dict[str, Any]:
    """Return fields of bodies from `name=value`; a value that is no JSON is a string.

    Raises:
        UsageError: One has no name, or is what a batch cannot have.
    """
    fields: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (equals and name) or name == "stream":
            raise UsageError(f"--field {text} is no field of a request.", hint="For example: --field max_tokens=200.")
        fields[name] = value
        with suppress(ValueError):
            fields[name] = json.loads(value)
    return fields


def _first_line(file: BinaryIO, path: Path) -> bytes:
    """Return the first line that is not empty, as far as it fits into memory.

    Raises:
        UsageError: There is none, or it is no text.
    """
    for _, raw in raw_lines(file):
        if raw is not None and not raw.strip():
            continue
        head = raw or b""
        is_text = not (head.startswith(_NOT_TEXT) or b"\0" in head)
        with suppress(UnicodeDecodeError):
            head.decode()
            if is_text:
                return head
        raise UsageError(f"'{path}' is no text in UTF-8.", hint="Save it as UTF-8, uncompressed.")
    raise UsageError(f"'{path}' is empty.", hint="Write a request a line: docs/batch.md.")


class _Bodies(io.RawIOBase):
    """A file of bodies, read as one of OpenAI's lines: a line is called after its number, and its keys tell the URL."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._number, self._is_begin = file, 0, True

    def readline(self, size: int | None = -1, /) -> bytes:
        raw = self._file.readline(-1 if size is None else size)
        is_begin, self._is_begin = self._is_begin, raw.endswith(b"\n")
        self._number += is_begin
        body = raw.removeprefix(b"\xef\xbb\xbf") if self._number == 1 else raw
        is_whole = is_begin and (self._is_begin or size is None or len(raw) < size)
        if not is_whole or not body.strip():  # a part of a line that is too long
            return raw
        keys = set[str]()
        with suppress(ValueError):
            keys = set(_BODY.decode(body))
        urls = [url for name, url in _OF_BODIES.items() if name in keys]
        url = json.dumps(urls[0] if len(urls) == 1 else None).encode()
        if not keys:
            return raw
        around = b'{"custom_id":"line-%d","method":"POST","url":%s,"body":' % (self._number, url)
        return around + body.rstrip(b"\r\n") + b"}\n"
