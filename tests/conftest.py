"""What concerns the whole suite: its options, and which tests one worker of pytest-xdist runs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from _pytest.nodeid import NodeId

from tests.engine.running import ONE_THREAD

os.environ.update(ONE_THREAD)

# Fixtures that take seconds to make (engines, proxies): all files with a test that uses one go to one worker, which
# makes it once. Every other file is a group of its own.
SHARED = ("attacked", "served", "agents_service", "tiny", "generating", "keyed")
# Tests that are timed without their fixtures: the first one may have to build environments.
BUILDING = tuple(Path(__file__).with_name(name) for name in ("engine", "clients"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make soak` run more than every test run does."""
    parser.addoption("--lifecycles", type=int, default=60, help="random lifecycles of fake engines, for each test")


def pytest_configure() -> None:
    """Take the signals, also in what the tests start, that nohup and a shell without job control have ignored."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Name the group of each test, for `--dist loadgroup`, and limit its time.

    pytest-xdist 3.8 reads the group from the end of a test's id, and writes it there itself, where pytest 9.2 no longer
    looks: without this every test is a group of its own, and each worker makes each fixture.
    """
    groups: dict[str, str] = {}
    for item in items:
        file, package = str(item.path), item.path.parent.name
        names = getattr(item, "fixturenames", ())
        shared = next((f"{package} {name}" for name in SHARED if name in names), None)
        groups[file] = shared or groups.get(file, file)
    for item in items:
        if getattr(config.option, "loadgroup", False):  # a worker of it
            item._id = NodeId.parse(f"{item.nodeid}@{groups[str(item.path)]}")
        if any(directory in item.path.parents for directory in BUILDING):
            item.add_marker(pytest.mark.timeout(300, func_only=True))
