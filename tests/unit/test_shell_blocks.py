"""The blocks of README, CONTRIBUTING and docs: all are found, and few commands in them are executed by no test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, blocks, exceptions, shell_blocks

LIMIT = 15


def test_commands_without_a_test_are_few_and_each_is_on_a_page_with_its_reason() -> None:
    """An exception whose command is gone goes too."""
    commands = {command for block in shell_blocks() for command in block.commands}
    assert set(exceptions()) <= commands
    assert all(len(reason.split()) > 3 for reason in exceptions().values())
    assert len(exceptions()) <= LIMIT


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_block_has_a_language_by_which_a_test_finds_it(page: Path) -> None:
    """A fence without one would hide its commands."""
    fences = [line for line in page.read_text().splitlines() if line.lstrip().startswith("```")]
    assert len(fences) == 2 * len(blocks(page))
