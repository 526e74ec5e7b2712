"""The engine process and its supervisor: the parent owns the process group, watches it, and never orphans it.

| state    | entered when                                        | `wait_for` beyond it                  |
|----------|-----------------------------------------------------|---------------------------------------|
| SPAWNED  | the process was started                             | waits                                 |
| IMPORTED | heavy imports are done; held here under `imported`  | waits for `release`                   |
| ASLEEP   | built, canary recorded, asleep; held under `asleep` | waits for `release`                   |
| READY    | the canary answered and the port accepts requests   | returns                               |
| STOPPED  | `stop` was called and the group is gone             | raises EngineError                    |
| FAILED   | it died, or was killed, without being asked to      | raises EngineError with the root line |

Only `_set` changes the state, and an end is final. Nothing here imports vllm.
"""

from __future__ import annotations

import contextlib
import enum
import http.client
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from service.engine_args import ENTRY, EngineCommand
from service.engine_log import EngineLog
from service.errors import EngineError, EngineTimeoutError

Hold = Literal["", "imported", "asleep"]
POLL_S = 0.01
KILL_WAIT_S = 5.0


class State(enum.Enum):
    """Where the engine is in its life, in order; the last two are ends."""

    SPAWNED = 0
    IMPORTED = 1
    ASLEEP = 2
    READY = 3
    STOPPED = 4
    FAILED = 5


_ENDS = (State.STOPPED, State.FAILED)


class EngineProcess:
    """One engine: spawn, hold, release, watch, stop.

    Args:
        command: From `engine_args.engine_command`.
        python: Interpreter of the environment that has vLLM.
        hold: Where it stops until `release`.
        neutral_imports: Import only what asks for no GPU before the hold (a snapshot is taken where none is visible).
        on_line: Called with every line of the engine's output, from a thread.
        on_event: Called with the name and fields of every event of the boot, from a thread.
        on_death: Called once, from a thread, when the engine ends without having been asked to.
    """

    def __init__(
        self,
        command: EngineCommand,
        *,
        python: str,
        hold: Hold = "",
        neutral_imports: bool = False,
        on_line: Callable[[str], None] | None = None,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
        on_death: Callable[[EngineError], None] | None = None,
    ) -> None:
        self.command = command
        self.log = EngineLog(on_line)
        self._python, self._hold, self._neutral = python, hold, neutral_imports
        self._on_event, self._on_death = on_event, on_death
        self._changed = threading.Condition()
        self._state = State.SPAWNED
        self._process: subprocess.Popen[bytes] | None = None
        self._words_fd = -1
        self._stopping = False
        self._spawned_at = 0.0
        self._ready_after_s: float | None = None
        self._failure: EngineError | None = None

    @property
    def state(self) -> State:
        """Where the engine is."""
        return self._state

    @property
    def pid(self) -> int:
        """Process id of the engine's leader, which is also the id of its process group."""
        assert self._process is not None, "spawn() comes first"  # noqa: S101 - a programming error, not an input
        return self._process.pid

    def spawn(self) -> None:
        """Start the process in a session and group of its own. Returns at once.

        Raises:
            EngineError: The interpreter cannot be run.
        """
        words_read, self._words_fd = os.pipe()
        events_read, events_write = os.pipe()
        env = dict(self.command.env)
        env["PATH"] = f"{Path(self._python).parent}{os.pathsep}{env.get('PATH', os.defpath)}"  # ninja, for JIT kernels
        env["ENGINE_PIPES"] = f"{words_read},{events_write}"
        env["ENGINE_HOLD"] = self._hold
        env["ENGINE_IMPORTS"] = "neutral" if self._neutral else "all"
        self._spawned_at = time.monotonic()
        try:
            self._process = subprocess.Popen(
                [self._python, "-m", ENTRY, *self.command.argv],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(words_read, events_write),
                start_new_session=True,
            )
        except OSError as error:
            os.close(self._words_fd)
            os.close(events_read)
            raise EngineError(
                f"The engine cannot be started with {self._python}: {error.strerror}. "
                "Delete that environment; the next start builds it anew."
            ) from error
        finally:
            os.close(words_read)
            os.close(events_write)
        threading.Thread(target=self._read_log, name="engine-log", daemon=True).start()
        events = threading.Thread(target=self._read_events, args=(events_read,), name="engine-events", daemon=True)
        events.start()
        threading.Thread(target=self._reap, args=(events,), name="engine-reaper", daemon=True).start()

    def release(self, digests: Iterable[str] = ()) -> None:
        """End the hold, and tell the engine the SHA-256 digests of the keys it accepts (none: it asks for no key)."""
        word = json.dumps({"word": "release", "digests": list(digests)}) + "\n"
        with self._changed:
            if self._state not in _ENDS:
                with contextlib.suppress(BrokenPipeError):  # it is dying: `wait_for` says why
                    os.write(self._words_fd, word.encode())

    def wait_for(self, state: State, timeout_s: float) -> None:
        """Block until the engine has reached `state`.

        Raises:
            EngineError: It ended before; the sentence has the exit code and the root error line of its log.
            EngineTimeoutError: It lives, but did not get there in `timeout_s` seconds.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._state.value >= state.value, timeout_s)
            if self._failure:
                raise self._failure
            if self._state in _ENDS:
                raise EngineError("The engine was stopped while somebody waited for it.")
            if self._state.value < state.value:
                raise EngineTimeoutError(
                    f"The engine was not {state.name} after {timeout_s:.0f} s, it got to {self._state.name}. "
                    f"Last line: '{self.log.last_line}'. Raise SERVICE_STARTUP_TIMEOUT_S or look at the log above."
                )

    def wait_ended(self, timeout_s: float | None = None) -> bool:
        """Block until the engine has ended, one way or the other; False when `timeout_s` passed before."""
        with self._changed:
            return self._changed.wait_for(lambda: self._state in _ENDS, timeout_s)

    def stop(self, grace_s: float) -> None:
        """End the engine: SIGTERM lets streams finish for `grace_s`, then the whole group is killed. Idempotent."""
        if self._process is None or self._state in _ENDS:
            return
        self._stopping = True
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        if not self.wait_ended(grace_s):
            self.kill()
            self.wait_ended(KILL_WAIT_S)

    def kill(self) -> None:
        """Kill the whole process group now."""
        self._stopping = True
        _kill_group(self.pid)

    def _read_log(self) -> None:
        assert self._process is not None  # noqa: S101 - spawn() set it
        assert self._process.stdout is not None  # noqa: S101 - spawn() asked for a pipe
        with self._process.stdout as output:
            for line in output:
                self.log.add(line.decode(errors="replace").rstrip("\n"))
        self.log.close()

    def _read_events(self, fd: int) -> None:
        with os.fdopen(fd, "r") as events:
            for line in events:
                self._advance(json.loads(line))

    def _advance(self, event: dict[str, Any]) -> None:
        name = event.pop("event")
        if name == "imported":
            self._set(State.IMPORTED)
        elif name == "asleep":
            self._set(State.ASLEEP)
        self._report(name, event)
        if name == "woken" or (name == "canary" and self._hold != "asleep"):
            threading.Thread(target=self._await_port, name="engine-port", daemon=True).start()

    def _await_port(self) -> None:
        """Poll until the port answers: a few milliseconds once the canary was given."""
        while self._state not in _ENDS:
            if self._healthy():
                self._ready_after_s = time.monotonic() - self._spawned_at
                self.log.begin_anew()
                self._report("ready", {"at": time.monotonic()})
                self._set(State.READY)
                return
            time.sleep(POLL_S)

    def _healthy(self) -> bool:
        host = "127.0.0.1" if self.command.host in {"0.0.0.0", "::"} else self.command.host  # noqa: S104 - compared
        connection = http.client.HTTPConnection(host, self.command.port, timeout=5)
        try:
            connection.request("GET", "/health")
            answer = connection.getresponse()
            return answer.status == 200 and answer.getheader("x-engine-pid") == str(self.pid)
        except (OSError, http.client.HTTPException):  # nobody there, or somebody who speaks no HTTP
            return False
        finally:
            connection.close()

    def _reap(self, events: threading.Thread) -> None:
        """Wait for the leader's end; then end what is left of its group, and say why it died unless it was asked to."""
        assert self._process is not None  # noqa: S101 - spawn() set it
        code = self._process.wait()
        lived_s = time.monotonic() - self._spawned_at
        _kill_group(self._process.pid)
        self.log.wait_closed(KILL_WAIT_S)
        events.join(KILL_WAIT_S)
        if not self._stopping:
            self._failure = EngineError(self.log.post_mortem(code, lived_s, self._ready_after_s))
        self._set(State.FAILED if self._failure else State.STOPPED)
        os.close(self._words_fd)
        if self._failure and self._on_death:
            self._on_death(self._failure)

    def _report(self, name: str, fields: dict[str, Any]) -> None:
        if self._on_event:
            self._on_event(name, fields)

    def _set(self, state: State) -> None:
        with self._changed:
            if self._state not in _ENDS:
                self._state = state
            self._changed.notify_all()


def _kill_group(pgid: int) -> None:
    """Kill a process group and wait, boundedly, until no member runs. Zombies that nobody reaps run no more."""
    deadline = time.monotonic() + KILL_WAIT_S
    while time.monotonic() < deadline:
        try:
            os.killpg(pgid, signal.SIGKILL)
        except ProcessLookupError:
            return
        if not _runs(pgid):
            return
        time.sleep(POLL_S)


def _runs(pgid: int) -> bool:
    """Tell whether a process group has a member that is no zombie."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) == pgid and state not in {"Z", "X"}:
                return True
    return False
