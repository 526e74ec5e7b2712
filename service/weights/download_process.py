"""From the hub into the cache, in a process of its own.

The hub's client downloads on threads that no interrupt ends, and leaves sockets and open files on a volume behind. A
child can be killed, and takes all that with it before a snapshot is taken. Run as `python -m` with this module: the
order comes as JSON on standard input, which stays open for as long as the parent lives; sentences, progress and the
result go out as JSON lines; what the client itself says goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from service import errors
from service.errors import ServiceError, WeightsError
from service.weights.download import download
from service.weights.files import Wanted
from service.weights.huggingface import in_reach as hub_in_reach
from service.weights.progress import Progress

PIECE_BYTES = 1 << 18
STALL_S = 300.0  # without one byte: what the client waits for will not come

__all__ = ["Progress", "Wanted", "hub_in_reach", "hub_token", "in_child"]


def hub_token(environ: Mapping[str, str]) -> str | None:
    """Return the hub's token; an empty variable is none."""
    return environ.get("HF_TOKEN", "").strip() or None


def in_child(
    wanted: Wanted,
    token: str | None,
    say: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Path:
    """Do as `download` does, in a child that is killed when this process is interrupted or dies.

    Raises:
        GatedModelError: The hub wants a token of somebody who accepted the model's licence.
        DiskSpaceError: The cache has too little room for what is missing, or got full.
        WeightsError: Anything else that keeps the files from being here whole.
    """
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if token:
        env["HF_TOKEN"] = token
    command = [sys.executable, "-m", "service.weights.download_process"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, start_new_session=True, **pipes) as child:
        try:
            return _follow(child, wanted, say, on_progress)
        except BaseException:
            child.send_signal(signal.SIGKILL)
            raise


def _follow(
    child: subprocess.Popen[str],
    wanted: Wanted,
    say: Callable[[str], None],
    on_progress: Callable[[Progress], None],
) -> Path:
    assert child.stdin is not None  # noqa: S101 - in_child asked for pipes
    assert child.stdout is not None  # noqa: S101 - in_child asked for pipes
    with contextlib.suppress(BrokenPipeError):  # it died at once; below it gets its sentence
        child.stdin.write(json.dumps(asdict(wanted)) + "\n")
        child.stdin.flush()
    for line in child.stdout:
        word = json.loads(line)
        if "say" in word:
            say(word["say"])
        elif "progress" in word:
            on_progress(Progress(**word["progress"]))
        elif "error" in word:
            raise getattr(errors, word["error"])(word["sentence"])
        else:
            return Path(word["path"])
    raise WeightsError(
        f"The download of {wanted.hub_id} ended with code {child.wait()} and no reason; what it said stands above. "
        "Start again: finished files are kept."
    )


def main() -> None:
    """Fetch what standard input orders."""
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _take_small_pieces()
    patterns = (tuple(order[name]) for name in ("ignore_patterns", "keep_patterns"))
    wanted = Wanted(order["hub_id"], order["revision"], *patterns)
    out = _Words(wanted)
    try:
        path = download(wanted, hub_token(os.environ), lambda sentence: out.tell({"say": sentence}), out.progress)
    except ServiceError as error:
        out.tell({"error": type(error).__name__, "sentence": str(error)})
    else:
        out.tell({"path": str(path)})
    os._exit(0)  # past the client's threads


def _take_small_pieces() -> None:
    """Let the client read files in smaller pieces than its 10 MB, of which each of its 8 threads keeps several.

    Measured on 2 cores: 365 MB became 98 MB, and a fifth of the time went with them (bench/weights.py).
    """
    from huggingface_hub import constants  # noqa: PLC0415 - only the child needs it

    constants.DOWNLOAD_CHUNK_SIZE = PIECE_BYTES


def _die_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


class _Words:
    """What goes to the parent, from several threads."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._lock = threading.Lock()
        self._last: Progress | None = None
        self._since = time.monotonic()

    def tell(self, word: Mapping[str, Any]) -> None:
        """Write a line."""
        with self._lock:
            sys.stdout.write(json.dumps(word) + "\n")
            sys.stdout.flush()

    def progress(self, progress: Progress) -> None:
        """Tell how far it is when that has changed; end it when it has not for long."""
        now = time.monotonic()
        if progress != self._last:
            self._last, self._since = progress, now
            self.tell({"progress": asdict(progress)})
        elif now - self._since > STALL_S:
            sentence = (
                f"{self._wanted.at} stalled: not a byte came within {STALL_S:.0f} s. Check the connection and start "
                "again: finished files are kept."
            )
            self.tell({"error": WeightsError.__name__, "sentence": sentence})
            os._exit(0)


if __name__ == "__main__":
    main()
