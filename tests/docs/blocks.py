"""The shell blocks of README, CONTRIBUTING and docs, and the commands in them."""

from __future__ import annotations

import re
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

from tests.engine.running import REPOSITORY

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
EXCEPTIONS = Path(__file__).with_name("exceptions.toml")
_BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.M | re.S)
PLACEHOLDER = re.compile(r"<[\w -]+>|…")
_SHELLS = {"bash", "sh", "shell", "console"}


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Attributes:
        page: Its path in the repository.
        line: Where it begins.
        language: What the page says that it is written in.
        text: What it has.
    """

    page: str
    line: int
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Its commands, each with the lines that it goes on in, without comments behind them."""
        found, rest = [], ""
        for line in self.text.splitlines():
            rest = f"{rest}\n{line}" if rest else line
            if rest.endswith("\\") or not _is_whole(rest):
                continue
            if command := re.sub(r"(^|\s+)#\s.*$", "", rest):
                found.append(command)
            rest = ""
        return [*found, *([rest] if rest else [])]


def blocks(page: Path) -> list[Block]:
    """Return a page's blocks, of every language."""
    text = page.read_text()
    name = str(page.relative_to(REPOSITORY))
    return [Block(name, text.count("\n", 0, found.start()) + 1, found[2], found[3]) for found in _BLOCK.finditer(text)]


def shell_blocks() -> list[Block]:
    """Return those in a shell's language, less those of docs/clients.md that tests/clients runs with real clients."""
    return [
        block
        for page in PAGES
        for block in blocks(page)
        if block.language in _SHELLS and (block.page, block.language) != ("docs/clients.md", "bash")
    ]


def exceptions() -> dict[str, str]:
    """Return the commands that no test executes, each with its reason."""
    return {command["text"]: command["reason"] for command in tomllib.loads(EXCEPTIONS.read_text())["command"]}


def _is_whole(script: str) -> bool:
    """Tell whether bash would run it; `<key>` would be a redirection."""
    checked = ["bash", "-n", "-c", PLACEHOLDER.sub("x", script)]
    return subprocess.run(checked, capture_output=True, check=False).returncode == 0
