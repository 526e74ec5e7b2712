"""Publishes an app with Modal's own command, in a process of its own: the modules read their settings when imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import ServiceError
from service.modal_app.deploy_plan import PlannedApp
from service.settings import PREFIX

ROOT = Path(__file__).parents[2]  # what has the package, wherever this command was started
_END_S = 10.0
_TAIL = 200


def publish(app: PlannedApp, tag: str, on_line: Callable[[str], None]) -> None:
    """Run `modal deploy` for an app, and tag its new version.

    Args:
        app: What to publish.
        tag: The tag of the version.
        on_line: Called with each line that the command prints.

    Raises:
        ServiceError: It failed; nothing of the app was changed.
        KeyboardInterrupt: It was interrupted; the command has ended.
    """
    line = [sys.executable, "-m", "modal", "deploy", "-m", app.module, "--tag", tag]
    tail: deque[str] = deque(maxlen=_TAIL)
    process = subprocess.Popen(
        line,
        cwd=ROOT,
        env=_environ(app),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a terminal's Ctrl-C reaches it through this process alone
    )
    with _ended_with_us(process):
        for text in process.stdout or ():
            if stripped := text.strip():
                tail.append(stripped)
                on_line(stripped)
        code = process.wait()
    if code:
        raise _failure(app, tail, code)


def _environ(app: PlannedApp) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return {**ours, **app.settings.to_env(), "PYTHONUNBUFFERED": "1", "COLUMNS": "1000", "NO_COLOR": "1"}


@contextmanager
def _ended_with_us(process: subprocess.Popen[str]) -> Iterator[None]:
    """End the command, as Ctrl-C does, where the block is left early."""
    try:
        yield
    except BaseException:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    finally:
        if process.stdout:
            process.stdout.close()


def _failure(app: PlannedApp, tail: deque[str], code: int) -> ServiceError:
    """Return the error of a deploy that failed: our own as it is, else Modal's last lines."""
    lines = [line.strip("│╭╰─╮╯ ") for line in tail]
    for number, text in enumerate(lines):
        if text.startswith("error: "):
            following = lines[number + 1] if number + 1 < len(lines) else ""
            return ServiceError(text.removeprefix("error: "), hint=following.removeprefix("hint: "))
    said = " ".join(line for line in lines[-3:] if line and line != "Error") or f"exit code {code}"
    return ServiceError(
        f"App '{app.name}' was not published: {said.rstrip('.')}.",
        hint=f"Nothing of it was changed. To see all of the output: {' '.join(_shown(app))}",
    )


def _shown(app: PlannedApp) -> Iterator[str]:
    if app.tier:
        yield f"SERVICE_MODEL={app.settings.model} {app.tier.settings}"
    yield f"modal deploy -m {app.module}"
