"""The engine process and its supervisor: the parent owns the process group, watches it, and never orphans it.

| state    | entered when                                        | `wait_for` beyond it                   |
|----------|-----------------------------------------------------|----------------------------------------|
| SPAWNED  | the process was started                             | waits                                  |
| IMPORTED | heavy imports are done; held here under `imported`  | waits for `release`                    |
| ASLEEP   | built, canary recorded, asleep; held under `asleep` | waits for `release`                    |
| READY    | the canary was generated and the port answers       | returns                                |
| STOPPED  | `stop` was called and the group has ended           | raises EngineError                     |
| FAILED   | it died, was killed, or hung, without `stop`        | raises EngineError with the root cause |

Only `_set` changes the state, and an end is final. A READY engine emits a heartbeat (see `in_engine/.../heartbeat.py`);
one without is killed. Nothing here imports vllm.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from service.engine.args import EngineCommand
from service.engine.health import answers_healthy
from service.engine.log import EngineLog
from service.engine.process_group import kill_group, reap_group
from service.engine.shutdown import MODAL_SHUTDOWN, ShutdownBudget
from service.engine.spawn import SpawnedEngine, spawn
from service.errors import EngineError, EngineTimeoutError
from service.in_engine.vllm_service.events import Event
from service.memory import core_growth_bytes, growth_bytes, oom_kills

Hold = Literal["", "imported", "asleep"]
POLL_S = 0.01
_LOOK_S = 1.0  # for a heartbeat
_ADAPTER_S = 120.0  # to read an adapter from a disk; the engine does so between two steps
HANG_S = 180.0  # without a heartbeat; longer than the compilation of a kernel in the middle of serving


class State(enum.Enum):
    """How far the engine has come, in order; the last two are ends."""

    SPAWNED = 0
    IMPORTED = 1
    ASLEEP = 2
    READY = 3
    STOPPED = 4
    FAILED = 5


_ENDS = (State.STOPPED, State.FAILED)
_ENTERED_WITH = {Event.IMPORTED: State.IMPORTED, Event.ASLEEP: State.ASLEEP}


class EngineProcess:
    """One engine: spawn, hold, release, watch, stop.

    Args:
        command: From `args.engine_command`.
        python: Interpreter of the environment that has vLLM.
        hold: Where it stops until `release`.
        neutral_imports: Before the hold import only what does not touch a GPU, since none is visible during a snapshot.
        hang_s: How long a READY engine may emit no heartbeat before it is killed.
        shutdown: How long each step of its end may take.
        on_line: Called with every line of the engine's output, from a thread.
        on_event: Called with every event of the boot and its fields, from a thread.
        on_lost: Called, from a thread, as soon as it is known that the engine ends without `stop`; why it ends is found
            out afterwards.
        on_death: Called once, from a thread, when the engine has ended without `stop`.
    """

    def __init__(
        self,
        command: EngineCommand,
        *,
        python: str,
        hold: Hold = "",
        neutral_imports: bool = False,
        hang_s: float = HANG_S,
        shutdown: ShutdownBudget = MODAL_SHUTDOWN,
        on_line: Callable[[str], None] | None = None,
        on_event: Callable[[Event, dict[str, Any]], None] | None = None,
        on_lost: Callable[[], None] | None = None,
        on_death: Callable[[EngineError], None] | None = None,
    ) -> None:
        self.command = command
        self.log = EngineLog(on_line)
        self._python, self._hold, self._neutral, self._hang_s = python, hold, neutral_imports, hang_s
        self._shutdown, self._on_event, self._on_death = shutdown, on_event, on_death
        self._on_lost, self._lost = on_lost, False
        self._reaper: threading.Thread | None = None
        self._changed = threading.Condition()
        self._state = State.SPAWNED
        self._spawned: SpawnedEngine | None = None
        self._stopping = self._drained = self._opened = False
        self._spawned_at, self._oom_kills = 0.0, 0
        self._ready_after_s: float | None = None
        self._failure: EngineError | None = None
        self._commands = 0
        self._outcomes: dict[int, str | None] = {}  # why a command about an adapter was refused, by its id

    @property
    def state(self) -> State:
        """How far the engine has come."""
        return self._state

    @property
    def pid(self) -> int:
        """Process id of the engine's leader, which is also the id of its process group."""
        return self._running.process.pid

    @property
    def _running(self) -> SpawnedEngine:
        assert self._spawned is not None, "spawn() comes first"  # noqa: S101 - a programming error, not an input
        return self._spawned

    def spawn(self) -> None:
        """Start the process in a session and group of its own. Returns at once.

        Raises:
            EngineError: The interpreter cannot be run.
        """
        self._spawned_at, self._oom_kills = time.monotonic(), oom_kills()
        variables = {"ENGINE_HOLD": self._hold, "ENGINE_IMPORTS": "neutral" if self._neutral else "all"}
        variables["ENGINE_HANG_S"] = str(self._hang_s)
        self._spawned = spawn(self.command, self._python, variables)
        threading.Thread(target=self._read_log, name="engine-log", daemon=True).start()
        events = threading.Thread(target=self._read_events, name="engine-events", daemon=True)
        events.start()
        self._reaper = threading.Thread(target=self._reap, args=(events,), name="engine-reaper", daemon=True)
        self._reaper.start()

    def release(
        self, digests: Iterable[str] = (), replica: str | None = None, traces: Mapping[str, str] | None = None
    ) -> None:
        """End the hold, and send what no snapshot may hold.

        Args:
            digests: SHA-256 of the keys that the engine accepts; none: it asks for no key.
            replica: Id of the replica, which the engine's answers have in a header.
            traces: OpenTelemetry's variables for the export of traces; none: it exports nothing.
        """
        growth = {"growth_bytes": growth_bytes(), "core_growth_bytes": core_growth_bytes()}
        self._send("release", digests=list(digests), **growth, replica=replica, traces=dict(traces or {}))

    def load_adapter(self, name: str, directory: Path, timeout_s: float = _ADAPTER_S) -> None:
        """Have a READY engine load a LoRA adapter. Blocks until requests may name it.

        Raises:
            EngineError: vLLM refused it, did not answer in time, or the engine ended meanwhile.
        """
        if refused := self._adapter_command("load_adapter", timeout_s, name=name, path=str(directory)):
            raise EngineError(
                f"The engine refused adapter '{name}': {refused}.",
                hint="Correct the adapter or name another one; the engine serves on.",
            )

    def unload_adapter(self, name: str, timeout_s: float) -> None:
        """Have the engine forget a LoRA adapter. Blocks until the requests of it that run have ended.

        Raises:
            EngineError: They did not in time, or the engine ended meanwhile.
        """
        self._adapter_command("unload_adapter", timeout_s, name=name)

    def _adapter_command(self, command: str, timeout_s: float, **fields: str) -> str | None:
        with self._changed:
            self._commands += 1
            id_ = self._commands
            self._send(command, id=id_, **fields)
            self._changed.wait_for(lambda: id_ in self._outcomes or self._state in _ENDS, timeout_s)
            if id_ not in self._outcomes:
                what = "ended" if self._state in _ENDS else f"has not done it after {timeout_s:.0f} s"
                raise EngineError(
                    f"The engine was to {command.replace('_', ' ')} '{fields['name']}' and {what}.",
                    hint="Its log shows what it does; try again.",
                )
            return self._outcomes.pop(id_)

    def _send(self, command: str, **fields: Any) -> None:
        line = json.dumps({"command": command, **fields}) + "\n"
        with self._changed:
            if self._state not in _ENDS:
                with contextlib.suppress(BrokenPipeError):  # it is dying: `wait_for` raises the reason
                    os.write(self._running.commands_fd, line.encode())

    def wait_for(self, state: State, timeout_s: float) -> None:
        """Block until the engine has reached `state`.

        Raises:
            EngineError: It ended before; the message has the exit code and the root cause from its log.
            EngineTimeoutError: It runs, but did not reach the state in `timeout_s` seconds.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._state.value >= state.value, timeout_s)
            if self._failure:
                raise self._failure
            if self._state in _ENDS:
                raise EngineError(
                    f"The engine was stopped before it was {state.name}, because the service is stopping.",
                    hint="Start it again.",
                )
            if self._state.value < state.value:
                raise EngineTimeoutError(
                    f"The engine was not {state.name} after {timeout_s:.0f} s, it got to {self._state.name}. "
                    f"Last line: '{self.log.last_line}'.",
                    hint="Raise SERVICE_STARTUP_TIMEOUT_S or look at the log above.",
                )

    def wait_ended(self, timeout_s: float | None = None) -> bool:
        """Block until the engine has ended, one way or the other; False when `timeout_s` passed before."""
        with self._changed:
            return self._changed.wait_for(lambda: self._state in _ENDS, timeout_s)

    def stop(self, grace_s: float) -> None:
        """End the engine: drain, terminate, kill the whole group. Idempotent; the shutdown budget bounds each step.

        Args:
            grace_s: How long requests in flight may go on; new ones are refused meanwhile. An engine that was not
                ready has none, and is killed.
        """
        if self._lost and self._reaper is not threading.current_thread() and self._reaper:
            self._reaper.join(self._shutdown.kill_s)  # so that why it was lost is reported before this process ends
        if self._spawned is None or self._state in _ENDS:
            return
        self._stopping = True
        budget = self._shutdown
        if self._state is State.READY and grace_s > 0:
            self._send("drain", grace_s=grace_s, cancel_s=budget.cancel_s)
            with self._changed:
                self._changed.wait_for(lambda: self._drained or self._state in _ENDS, grace_s + budget.cancel_s)
            self._send("terminate")
            self.wait_ended(budget.terminate_s)
        deadline = time.monotonic() + budget.kill_s
        kill_group(self.pid, budget.kill_s)
        self.wait_ended(max(0.0, deadline - time.monotonic()))

    def kill(self) -> EngineError | None:
        """Kill an engine that no longer listens; that counts as its death. Return the cause. Blocks."""
        if self._spawned is not None and self._state not in _ENDS:
            kill_group(self.pid, self._shutdown.kill_s)
            self.wait_ended(self._shutdown.kill_s)
        return self._failure

    def _read_log(self) -> None:
        output = self._running.process.stdout
        assert output is not None  # noqa: S101 - spawn() opens a pipe
        with output:
            for line in output:
                self.log.add(line.decode(errors="replace").rstrip("\n"))
        self.log.close()

    def _read_events(self) -> None:
        """Take events until the engine's end, and notice when a heartbeat is missing.

        Only the looks are counted, not the time between them: this process may have been paused together with the
        engine, as `docker pause` does.
        """
        poll = select.poll()
        poll.register(self._running.events_fd, select.POLLIN)
        buffer, look_s, silent_s = b"", min(_LOOK_S, self._hang_s / 10), 0.0
        with os.fdopen(self._running.events_fd, "rb", buffering=0) as events:
            while True:
                if not poll.poll(look_s * 1000 if self._needs_heartbeat else None):
                    silent_s += look_s
                    if silent_s >= self._hang_s:
                        self._end_hung()
                elif chunk := events.read(65536):
                    silent_s = 0.0
                    *lines, buffer = (buffer + chunk).split(b"\n")
                    for line in lines:
                        fields = json.loads(line)
                        self._take(Event(fields.pop("event")), fields)
                else:
                    return

    @property
    def _needs_heartbeat(self) -> bool:
        return self._opened and not self._stopping and not self._failure

    def _end_hung(self) -> None:
        self._fail(
            f"The engine hung: it generated no token for {self._hang_s:.0f} s, though a probe requested one. "
            "It was killed.",
            hint="Its log shows what it did last; raise SERVICE_HANG_S to allow it more time.",
        )

    def _fail(self, message: str, hint: str = "") -> None:
        """Kill an engine that is alive and must not serve."""
        if not self._stopping:
            self._failure = EngineError(message, hint=hint)
            self._report_lost()
            kill_group(self.pid, self._shutdown.kill_s)

    def _take(self, event: Event, fields: dict[str, Any]) -> None:
        """Take note of an event. It is reported before the state that it brings about is entered."""
        if event.is_boot_event or event is Event.USAGE:
            self._report(event, fields)
        if state := _ENTERED_WITH.get(event):
            self._set(state)
        elif event is Event.ADAPTER:
            self._outcomes[fields["id"]] = fields["error"]
            self._set(self._state)
        elif event is Event.DRAINED:
            self._drained = True
            self._set(self._state)
        if different := fields.get("different"):
            self._fail(
                f"The engine did not wake as it fell asleep: in its canary {different}. Its memory was not restored as "
                "it was; it was killed before it could answer a request."
            )
        if event is Event.OPENING:
            self._opened = True
            threading.Thread(target=self._await_port, name="engine-port", daemon=True).start()

    def _await_port(self) -> None:
        """Poll until the port answers: a few milliseconds once the canary was generated."""
        while self._state not in _ENDS:
            if answers_healthy(self.command.host, self.command.port, self.pid):
                self._ready_after_s = time.monotonic() - self._spawned_at
                self._report(Event.READY, {"at": time.monotonic()})
                self._set(State.READY)
                return
            time.sleep(POLL_S)

    def _reap(self, events: threading.Thread) -> None:
        """Wait for the leader's end; then end the rest of its group, and record why it died if nothing stopped it."""
        code = self._running.process.wait()
        lived_s = time.monotonic() - self._spawned_at
        if not self._stopping and not self._failure:
            self._report_lost()
        kill_group(self.pid, self._shutdown.kill_s)
        reap_group(self.pid)
        self.log.wait_closed(self._shutdown.kill_s)
        events.join(self._shutdown.kill_s)
        if self._lost and not self._failure:
            out_of_memory = oom_kills() > self._oom_kills
            self._failure = self.log.describe_exit(code, lived_s, self._ready_after_s, out_of_memory=out_of_memory)
        self._running.remove_directory()
        self._set(State.FAILED if self._failure else State.STOPPED)
        os.close(self._running.commands_fd)
        if self._failure and self._on_death:
            self._on_death(self._failure)

    def _report_lost(self) -> None:
        self._lost = True
        if self._on_lost:
            with contextlib.suppress(Exception):  # an observer that raises must not keep the engine from its end
                self._on_lost()

    def _report(self, event: Event, fields: dict[str, Any]) -> None:
        if self._on_event:
            with contextlib.suppress(Exception):  # an observer that raises must not stop the engine
                self._on_event(event, fields)

    def _set(self, state: State) -> None:
        with self._changed:
            if self._state not in _ENDS:
                self._state = state
            self._changed.notify_all()
