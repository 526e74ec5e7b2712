"""Rows of a table, or objects of a file of JSON lines, as requests: a prompt template, and answers as columns."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from service.batch.lines import LINE_LIMIT, BadLine, raw_lines
from service.errors import UsageError, did_you_mean

_MARK = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Row:
    """A row of the input.

    Attributes:
        number: Of its first line, from 1.
        fields: Its values by column; of a JSON object whatever it has.
    """

    number: int
    fields: Mapping[str, Any]


class Template:
    """A prompt with `{column}` where a row's value is put; `{{` and `}}` are braces.

    Args:
        text: The prompt.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self.columns = {match[1] for match in _MARK.finditer(text) if match[1] is not None}

    def check(self, columns: Sequence[str]) -> None:
        """Insist on columns that the table has.

        Raises:
            UsageError: It names another one.
        """
        for name in sorted(self.columns - set(columns)):
            raise UsageError(
                f"--prompt has {{{name}}}, which is no column.{did_you_mean(name, columns)} Columns: "
                f"{', '.join(columns)}.",
                hint="Name one of them, and write {{ and }} for braces that are part of the prompt.",
            )

    def filled(self, row: Row) -> str:
        """Return the prompt of a row.

        Raises:
            KeyError: The row has no such field.
        """

        def value(match: re.Match[str]) -> str:
            if match[1] is None:
                return match[0][0]
            found = row.fields[match[1]]
            return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

        return _MARK.sub(value, self._text)


def is_table(path: Path) -> bool:
    """Tell whether a file is a table, by its name."""
    return path.suffix.lower() in _DELIMITERS


def delimiter(path: Path) -> str:
    """Return what is between the cells of a table."""
    return _DELIMITERS[path.suffix.lower()]


def header(file: BinaryIO, path: Path) -> list[str]:
    """Return the columns of a table. Blocks.

    Raises:
        UsageError: It has none, or a column twice.
    """
    for _, cells in _cells(file, path):
        if isinstance(cells, str):
            raise UsageError(f"The first line of '{path}' cannot be read: {cells}.", hint="Save it as CSV in UTF-8.")
        if twice := sorted({name for name in cells if cells.count(name) > 1}):
            raise UsageError(f"'{path}' has the column '{twice[0]}' twice.", hint="Give each column a name of its own.")
        return cells
    raise UsageError(f"'{path}' has no line with the names of its columns.", hint="Write them into its first line.")


def table_rows(file: BinaryIO, path: Path) -> Iterator[Row | BadLine]:
    """Yield the rows of a table after its header; a row that is wrong is a `BadLine`. Blocks."""
    names: list[str] = []
    for number, cells in _cells(file, path):
        if isinstance(cells, str):
            yield BadLine(number, None, "invalid_row", f"Line {number}: {cells}.")
        elif not names:
            names = cells
        elif len(cells) != len(names):
            why = f"Line {number}: it has {len(cells)} cells, and the first line has {len(names)}."
            yield BadLine(number, None, "invalid_row", why)
        else:
            yield Row(number, dict(zip(names, cells, strict=True)))


def json_rows(file: BinaryIO) -> Iterator[Row | BadLine]:
    """Yield the objects of a file of JSON lines; a line that is none is a `BadLine`. Blocks."""
    for number, raw in raw_lines(file):
        if raw is None:
            why = f"Line {number}: it is longer than {LINE_LIMIT} bytes, which is the limit."
            yield BadLine(number, None, "line_too_long", why)
        elif raw.strip():
            try:
                fields = json.loads(raw)
            except (ValueError, RecursionError):
                fields = None
            if isinstance(fields, dict):
                yield Row(number, fields)
            else:
                yield BadLine(number, None, "invalid_json", f"Line {number}: it is no JSON object.")


def _cells(file: BinaryIO, path: Path) -> Iterator[tuple[int, list[str] | str]]:
    """Yield the first line's number and the cells of each row; a sentence's part in place of cells that are wrong."""
    csv.field_size_limit(LINE_LIMIT)
    too_long: list[int] = []

    def lines() -> Iterator[str]:
        for number, raw in raw_lines(file):
            if raw is None:
                too_long.append(number)
            yield "\n" if raw is None else raw.decode("utf-8", "surrogateescape")

    reader, number = csv.reader(lines(), delimiter=delimiter(path), strict=True), 1
    while True:
        try:
            cells: list[str] | str = next(reader)
            "".join(cells).encode()
        except StopIteration:
            return
        except UnicodeEncodeError:
            cells = "it is not UTF-8"
        except csv.Error as error:
            what = "a quote is opened and not closed" if "unexpected end" in str(error) else str(error)
            cells = f"{what} (lines {number} to {reader.line_num})"
        if too_long:
            cells = f"it is longer than {LINE_LIMIT} bytes, which is the limit"
            too_long.clear()
        if cells:
            yield number, cells
        number = reader.line_num + 1


def answer_columns(schema: Mapping[str, Any] | None, columns: Sequence[str]) -> list[str]:
    """Return the columns that answers fill: the schema's properties, or `answer`; none has the name of another one."""
    wanted = list((schema or {}).get("properties") or ["answer"])
    return [name if name not in columns else f"answer_{name}" for name in wanted]


def answer_cells(schema: Mapping[str, Any] | None, text: str) -> list[str]:
    """Return the cells of an answer.

    Raises:
        msgspec.DecodeError: It is no JSON object.
    """
    properties = list((schema or {}).get("properties") or ())
    if not properties:
        return [text]
    found = msgspec.json.decode(text, type=dict[str, Any])
    return [_cell(found.get(name)) for name in properties]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
