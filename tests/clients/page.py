"""The code blocks of docs/clients.md, with what the tests put in the place of the reader's own values."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.engine.running import REPOSITORY

PAGE = REPOSITORY / "docs" / "clients.md"


@dataclass(frozen=True)
class Block:
    """A block of the page."""

    section: str
    language: str
    text: str


def blocks() -> list[Block]:
    """Return the page's blocks in their order, less those marked `console`, which tests/docs runs."""
    found, section = [], ""
    for heading, language, text in re.findall(r"^##+ ([^\n]+)$|^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.M | re.S):
        section = heading or section
        if not heading and language != "console":
            found.append(Block(section, language, text))
    return found
