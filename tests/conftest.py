"""What concerns the whole suite: its options, and which tests one worker of pytest-xdist runs."""

from __future__ import annotations

import os

import pytest

from tests.engine.running import ONE_THREAD

os.environ.update(ONE_THREAD)

# Fixtures that take seconds to make (engines, proxies): all files with a test that uses one go to one worker, which
# makes it once. Every other file is a group of its own.
SHARED = ("served", "tiny", "generating")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make soak` run more than every test run does."""
    parser.addoption("--lifecycles", type=int, default=60, help="random lifecycles of fake engines, for each test")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Name the group of each test, for `--dist loadgroup`."""
    groups: dict[str, str] = {}
    for item in items:
        file, package = str(item.path), item.path.parent.name
        names = getattr(item, "fixturenames", ())
        shared = next((f"{package} {name}" for name in SHARED if name in names), None)
        groups[file] = shared or groups.get(file, file)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(groups[str(item.path)]))
