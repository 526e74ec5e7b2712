"""What the unit tests share: a clean environment, free ports, and an interpreter that is a fake engine."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from service import interrupts, memory
from service.engine.args import IN_ENGINE, EngineCommand
from service.registry.models import Registry
from service.replica.plan import Plan
from tests.unit.hub_client import cache, hub, slept  # noqa: F401 - fixtures
from tests.unit.replicas import Place

_OURS = ("SERVICE_", "API_KEY", "HF_", "HUGGING", "MODAL_", "VLLM_", "CUDA_", "XDG_")
FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove this service's variables of the developer's shell; caches and logs go to a directory of the test."""
    memory._reading.cache_clear()  # another test's machine
    for name in os.environ:
        if name.startswith(_OURS):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture(autouse=True)
def _no_interrupt_is_left() -> Iterator[None]:
    """Forget what a word that ran in this process has noted of Ctrl-C: the next test would be interrupted by it."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)
    interrupts.handled()


@pytest.fixture
def port() -> int:
    """Return a free port of loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def fake_python(tmp_path: Path) -> str:
    """Return the path of an interpreter that runs the fake engine in the place of `-m vllm_service.main`."""
    wrapper = tmp_path / "bin" / "python"
    wrapper.parent.mkdir(exist_ok=True)
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{FAKE_ENGINE}" "$@"\n')
    wrapper.chmod(0o755)
    return str(wrapper)


@pytest.fixture
def fake_command(port: int) -> Callable[..., EngineCommand]:
    """Return a function from the fake engine's script to the command that starts it."""

    def command(**script: Any) -> EngineCommand:
        env = {"PYTHONPATH": str(IN_ENGINE), "PATH": os.defpath, "VLLM_CPU_FAKE_ENGINE": json.dumps(script)}
        return EngineCommand(("--host", "127.0.0.1", "--port", str(port)), env, "127.0.0.1", port)

    return command


@pytest.fixture
def plan(fake_python: str, port: int) -> Iterator[Plan]:
    """Return the plan of a replica with the fake engine; no process is left after the test."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    tiny = Registry.load().specs["tiny"]
    yield Plan(tiny, "tiny", "cpu", fake_python, {"PATH": os.defpath}, port=port, startup_timeout_s=20)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return a function that returns the warnings which the service has logged."""
    return lambda: [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


@pytest.fixture
def engine_output(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return a function that returns the lines of engines' output which were logged."""
    caplog.set_level(logging.INFO, "service.engine.output")
    return lambda: [one.getMessage() for one in caplog.records if one.name == "service.engine.output"]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Return two empty volumes and room for local disks."""
    return Place(tmp_path)
