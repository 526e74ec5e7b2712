"""What is said when Modal's own command fails."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path

import pytest

from service.errors import ServiceError
from service.modal_app import publish as publishing
from service.modal_app.deploy_plan import DeployRequest, PlannedApp, make_plan
from service.settings import Settings


@pytest.fixture
def app() -> PlannedApp:
    """The tier of the tiny model."""
    return make_plan(DeployRequest(("tiny-l4",)), Settings.load({}), lambda _: None).apps[0]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the place of Python and Modal's command."""
    file = tmp_path / "python"
    file.touch(0o755)
    monkeypatch.setattr(sys, "executable", str(file))
    return file


def test_publish_gives_the_command_the_apps_settings_and_tag(
    app: PlannedApp, command: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none of this process's own settings."""
    monkeypatch.setenv("SERVICE_NAME", "something of the platform")
    command.write_text('#!/bin/sh\necho "$@"\necho $SERVICE_MODEL $SERVICE_GPU $SERVICE_N_GPU$SERVICE_NAME\npwd\n')
    lines: list[str] = []
    publishing.publish(app, "some-tag", lines.append)
    assert lines == ["-m modal deploy -m service.server --tag some-tag", "tiny L4 1", str(publishing.ROOT)]


@pytest.mark.parametrize(
    ("printed", "message", "hint"),
    [
        (["error: A gated model.", "hint: Create it."], "A gated model.", "Create it."),
        (
            ["✓ Created mount", "╭─ Error ───╮", "│ Reached the limit. │", "╰────╯"],
            "App 'vllm-l4' was not published: Reached the limit.",
            "Nothing of it was changed. To see all of the output: "
            "SERVICE_MODEL=tiny SERVICE_GPU=L4 modal deploy -m service.server",
        ),
        ([], "App 'vllm-l4' was not published: exit code 7.", "Nothing of it was changed."),
    ],
)
def test_publish_that_fails_says_why(app: PlannedApp, printed: list[str], message: str, hint: str) -> None:
    """Our own errors as they are, else the last lines of Modal's."""
    error = publishing._failure(app, deque(printed), 7)
    assert isinstance(error, ServiceError)
    assert error.message == message
    assert error.hint.startswith(hint)


def test_publish_interrupted_ends_the_command(app: PlannedApp, command: Path, tmp_path: Path) -> None:
    """It gets the Ctrl-C that this process got, and has ended when this returns."""
    told = tmp_path / "told"
    command.write_text(f"#!/bin/sh\ntrap 'echo interrupted > {told}; exit 1' INT\necho begun\nsleep 20 & wait\n")
    interrupt = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        publishing.publish(app, "some-tag", lambda _: interrupt.start())
    assert told.read_text() == "interrupted\n"
    assert time.monotonic() - began < 15
