"""Options of the whole suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make soak` run more than every test run does."""
    parser.addoption("--lifecycles", type=int, default=60, help="random lifecycles of fake engines, for each test")
