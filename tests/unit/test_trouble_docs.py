"""docs/trouble.md: its literals are those of the code, and its codes are all that there are."""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

from service.boots.known_errors import recognise

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/trouble.md").read_text()
LITERAL = re.compile(r"`([^`]+)`")
OURS = ("The command", "Weights", "Modal")
# Of others, or in the words of people who report it; `vllm-service doctor FILE` explains each.
REPORTED = {
    "Container failed to start within 10 minutes": "start-up time-out",
    "First request takes 2-3 minutes": "cold start",
    "Error downloading model from HuggingFace": "model download",
    "endpoint limit": "endpoint limit",
    "Torch compilation failed": "compilation",
    "BackendCompilerFailed": "compilation",
    "CUDA out of memory": "GPU memory",
}
OF_MODAL = "Token missing. Could not authenticate client."


def section(title: str) -> str:
    """Return a section of the page."""
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def literals(title: str) -> list[str]:
    """Return what the first column of a section's table has between backticks."""
    rows = [
        row.split(" | ")[0] for row in section(title).splitlines() if row.startswith("| ") and "what you see" not in row
    ]
    return [literal for row in rows for literal in LITERAL.findall(row)]


@cache
def texts() -> str:
    """Return every text of the service's code, with … for what is put in, each on a line."""
    found = []
    for file in (ROOT / "service").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [str(one.value) if isinstance(one, ast.Constant) else "…" for one in node.values]
                found.append("".join(parts))
    return "\n".join(found)


@pytest.mark.parametrize("literal", [literal for title in OURS for literal in literals(title)])
def test_literal_of_the_service_is_what_its_code_says(literal: str) -> None:
    """Each part between what differs; a sentence that is changed in the code is changed on the page."""
    if literal in REPORTED or literal == OF_MODAL:
        return
    missing = [part for part in literal.split("…") if part.strip() and part not in texts()]
    assert missing == []


def test_literal_of_modals_client_is_what_its_code_says() -> None:
    """Of the pinned release."""
    (directory,) = importlib.util.find_spec("modal").submodule_search_locations  # type: ignore[union-attr]
    assert OF_MODAL in section("Modal")
    assert OF_MODAL in (Path(directory) / "client.py").read_text()


@pytest.mark.parametrize(("literal", "name"), REPORTED.items())
def test_words_of_a_report_are_explained_by_doctor_too(literal: str, name: str) -> None:
    """They are on the page, and the command knows them."""
    assert f"`{literal}`" in PAGE
    assert [one.error.name for one in recognise([literal])] == [name]


def test_page_explains_every_code_of_the_api() -> None:
    """Those of the table in docs/gateway.md, which is held to the code, each beside its status."""
    rows = re.findall(r"^\| (\d{3}) \|.*\|.*\|(.*)\|$", (ROOT / "docs/gateway.md").read_text(), re.MULTILINE)
    known = {(status, code) for status, codes in rows for code in LITERAL.findall(codes)}
    explained = set()
    for row in section("The API").splitlines():
        cell = row.split(" | ")[0]
        explained |= {(status, code) for status in re.findall(r"\d{3}", cell) for code in LITERAL.findall(cell)}
    assert explained == known
