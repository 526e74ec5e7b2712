"""The engine's side of the two pipes to its parent: events out, commands in.

Commands are JSON lines:
- `release` ends the hold and carries what must be in no command line, environment or snapshot: the digests of the keys,
  how many bytes of memory this machine can spare for the API server and the core (`memory_ceiling`), the replica's id,
  and OpenTelemetry's variables, whose headers may hold a token.
- `load_adapter` and `unload_adapter`: `name`, a directory `path`, and `id`, which the event of the outcome repeats.
- `drain` begins the end: `grace_s` seconds for the requests in flight, `cancel_s` to cancel what is left then.
- `terminate` ends the engine, once it is drained; signals do not (see `end_signals`).

The end of the pipe means that the parent has ended. Then the whole process group is killed at once: no engine may
hold a GPU without a parent that watches it.
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

from vllm_service.events import Event

FDS_VARIABLE = "ENGINE_PIPES"  # "<commands read end>,<events write end>"
DIRECTORY_VARIABLE = "ENGINE_DIRECTORY"  # the parent made it for this engine alone

Command = dict[str, Any]


class ParentPipe:
    """Both pipes; commands are read on a thread. One per process; see `current`."""

    def __init__(self, commands_fd: int, events_fd: int) -> None:
        self._commands = os.fdopen(commands_fd, "rb", buffering=0)
        self._events_fd = events_fd
        self._lock = threading.Lock()
        self._on_release: list[Callable[[], None]] = []
        self.release: Command = {}
        self.on_drain: Callable[[Command], None] = lambda _: None  # called on the thread
        self.on_adapter: Callable[[Command], None] = lambda _: None  # called on the thread
        self.on_terminate: Callable[[], None] = lambda: None  # called on the thread
        threading.Thread(target=self._listen, name="vllm_service-parent-pipe", daemon=True).start()

    def emit(self, event: Event, **fields: Any) -> None:
        """Report an event with the time it happened (CLOCK_MONOTONIC, the same in every process of a machine)."""
        line = json.dumps({"event": event, "at": time.monotonic(), **fields}) + "\n"
        os.write(self._events_fd, line.encode())

    def wait_for_release(self) -> Command:
        """Block until the parent sends `release`, and return it."""
        released = threading.Event()
        self.when_released(released.set)
        released.wait()
        return self.release

    def when_released(self, call: Callable[[], None]) -> None:
        """Have `call` called, on a thread, once the parent has sent `release`; at once when it has already."""
        with self._lock:
            if not self.release:
                self._on_release.append(call)
                return
        call()

    def _listen(self) -> None:
        buffer = b""
        while chunk := self._commands.read(65536):
            buffer += chunk
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                self._take(json.loads(line))
        if directory := os.environ.get(DIRECTORY_VARIABLE):
            shutil.rmtree(directory, ignore_errors=True)  # the parent, which otherwise removes it, has ended
        os.killpg(os.getpgid(0), signal.SIGKILL)

    def _take(self, command: Command) -> None:
        if command["command"] == "release":
            with self._lock:
                self.release, waiting = command, self._on_release
            for call in waiting:
                call()
        elif command["command"] == "drain":
            self.on_drain(command)
        elif command["command"] in {"load_adapter", "unload_adapter"}:
            self.on_adapter(command)
        elif command["command"] == "terminate":
            self.on_terminate()


_current: ParentPipe | None = None


def _forget() -> None:
    global _current  # noqa: PLW0603 - see above
    _current = None


os.register_at_fork(after_in_child=_forget)  # a child has neither the thread nor the duty


def current() -> ParentPipe | None:
    """Return this process's pipes, opened on the first call; None in vLLM's own child processes."""
    global _current  # noqa: PLW0603 - one pipe, one reader
    if _current is None and (fds := os.environ.pop(FDS_VARIABLE, None)):
        commands_fd, events_fd = (int(fd) for fd in fds.split(","))
        for fd in (commands_fd, events_fd):
            os.set_inheritable(fd, False)
        _current = ParentPipe(commands_fd, events_fd)
    return _current
