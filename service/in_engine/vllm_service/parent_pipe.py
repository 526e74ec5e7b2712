"""The engine's side of the two pipes to its parent: events out, words in.

Words come as JSON lines:
- `release` ends the hold and carries what must be in no command line, environment or snapshot: the digests of the keys.
- `drain` begins the end: `grace_s` seconds for the requests in flight, `cancel_s` to cancel what is left then.

The end of the pipe means that the parent is gone, and then the engine's whole process group is killed at once: nothing
may go on holding a GPU that nobody watches.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

FDS_VARIABLE = "ENGINE_PIPES"  # "<words read end>,<events write end>"
DIRECTORY_VARIABLE = "ENGINE_DIRECTORY"  # the parent made it for this engine alone

Word = dict[str, Any]


class Control:
    """The pipes, read on a thread of their own. One per process; see `current`."""

    def __init__(self, words_fd: int, events_fd: int) -> None:
        self._words = os.fdopen(words_fd, "rb", buffering=0)
        self._events_fd = events_fd
        self._told = threading.Lock()
        self._on_release: list[Callable[[], None]] = []
        self.release: Word = {}
        self.on_drain: Callable[[Word], None] = lambda _: None  # called on the thread
        threading.Thread(target=self._listen, name="vllm_service-control", daemon=True).start()

    def tell(self, event: str, **fields: Any) -> None:
        """Report an event with the time it happened (CLOCK_MONOTONIC, the same in every process of a machine)."""
        line = json.dumps({"event": event, "at": time.monotonic(), **fields}) + "\n"
        os.write(self._events_fd, line.encode())

    def wait_for_release(self) -> Word:
        """Block until the parent says `release` and return what it said."""
        released = threading.Event()
        self.when_released(released.set)
        released.wait()
        return self.release

    def when_released(self, call: Callable[[], None]) -> None:
        """Have `call` called, on a thread, once the parent has said `release`; at once when it has already."""
        with self._told:
            if not self.release:
                self._on_release.append(call)
                return
        call()

    def _listen(self) -> None:
        buffer = b""
        while chunk := self._words.read(65536):
            buffer += chunk
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                self._take(json.loads(line))
        if directory := os.environ.get(DIRECTORY_VARIABLE):
            shutil.rmtree(directory, ignore_errors=True)  # nobody else is left to do it
        os.killpg(os.getpgid(0), signal.SIGKILL)

    def _take(self, word: Word) -> None:
        if word["word"] == "release":
            with self._told:
                self.release, waiting = word, self._on_release
            for call in waiting:
                call()
        elif word["word"] == "drain":
            self.on_drain(word)


_current: Control | None = None


def _forget() -> None:
    global _current  # noqa: PLW0603 - see above
    _current = None


os.register_at_fork(after_in_child=_forget)  # a child has neither the thread nor the duty


def current() -> Control | None:
    """Return this process's control, opened on the first call; None in vLLM's own child processes."""
    global _current  # noqa: PLW0603 - one pipe, one reader
    if _current is None and (fds := os.environ.pop(FDS_VARIABLE, None)):
        words_fd, events_fd = (int(fd) for fd in fds.split(","))
        for fd in (words_fd, events_fd):
            os.set_inheritable(fd, False)
        _current = Control(words_fd, events_fd)
    return _current
