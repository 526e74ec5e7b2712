"""The table of errors in docs/gateway.md: as complete as the code, and no more."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from service.in_engine.vllm_service.api_error import ERROR_NAMES, error_names

ROOT = Path(__file__).parents[3]
WORD = re.compile("`([a-z_]+)`")


def table() -> dict[int, tuple[str, str, list[str]]]:
    """Return the table's rows: status -> OpenAI's type, Anthropic's type, codes."""
    rows = re.findall(r"^\| (\d{3}) \|(.*)\|(.*)\|(.*)\|$", (ROOT / "docs/gateway.md").read_text(), re.M)
    cells = {int(status): [WORD.findall(cell) for cell in row] for status, *row in rows}
    return {status: (openai[0], anthropic[0], codes) for status, (openai, anthropic, codes) in cells.items()}


def literals() -> tuple[set[tuple[int, str]], set[str]]:
    """Return status and code of every error that the code raises with both written out, and all its strings."""
    pairs, strings = set(), set()
    for file in (ROOT / "service").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.add(node.value)
            elif isinstance(node, ast.Call):
                pairs |= set(_status_and_code(node))
    return pairs, strings


def _status_and_code(call: ast.Call) -> Iterator[tuple[int, str]]:
    code = next((word.value for word in call.keywords if word.arg == "code"), None)
    status = call.args[0] if call.args else None
    if isinstance(code, ast.Constant) and isinstance(status, ast.Constant) and isinstance(status.value, int):
        yield status.value, str(code.value)


def test_documented_types_are_those_of_the_table_in_the_code() -> None:
    """Every status that has names of its own is there."""
    documented = table()

    assert documented.keys() >= ERROR_NAMES.keys()
    for status, (openai, anthropic, _) in documented.items():
        assert (openai, anthropic) == (error_names(status).openai, error_names(status).anthropic), status


def test_documented_codes_are_those_that_the_code_has() -> None:
    """Each code stands in the row of its status, and no row has one that nothing raises."""
    documented, (raised, strings) = table(), literals()
    known = {(status, code) for status, (_, _, codes) in documented.items() for code in codes}
    defaults = {(status, names.code) for status, names in ERROR_NAMES.items()}
    unseen = {(499, "client_left")}  # its client is gone

    assert (raised | defaults) - unseen <= known, (raised | defaults) - unseen - known
    assert {code for _, code in known} <= strings
