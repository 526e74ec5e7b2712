"""The lifecycle of one replica, the same on Modal and on a laptop: prepare, (checkpoint), start, stop.

`snapshot` says how far `prepare` goes before a checkpoint may be taken, and so what is left to `start`:
- `off`: the weights are there; nothing is running.
- `cpu`: the engine process is running, has imported what needs no GPU, and is held with no socket open.
- `gpu`: the engine is built and warmed up, has recorded its canary generation, and is in sleep mode, with no port and
  no keys. After waking it must generate the same; else it is killed and booted cold, in the same `start`.

The lines of the engine's output are records of the logger `service.engine.output`, with the model's key as `model`.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from service import otel
from service.boots import records
from service.boots.phases import Phases
from service.boots.records import BootRecord
from service.engine.process import EngineProcess, Hold, State
from service.errors import EngineError, EngineTimeoutError, ServiceError
from service.hardware import Hardware, check_gpu_count, probe
from service.in_engine.vllm_service.events import Event
from service.keys import digest
from service.replica.plan import Plan, Snapshot
from service.replica.readahead import Readahead
from service.replica.results import BootResults
from service.weights import store

_log = logging.getLogger(__name__)
_output = logging.getLogger("service.engine.output")
_UNLOAD_S = 86400.0  # as long as a request may run
_HOLDS: dict[Snapshot, Hold] = {"cpu": "imported", "gpu": "asleep"}  # before the checkpoint


class Replica:
    """One engine and the order in which it is brought up. Methods block.

    Args:
        plan: Its model, engine, strategy and limits.
        on_event: Called with each event of the engine's boot, from a thread.
        on_lost: Called once, from a thread, as soon as an engine that was ready dies, or is to be killed for a hang.
        on_death: Called once, from a thread, with the reason; of an engine that was not ready `start` raises.
        on_record: Called with the record of each boot that has ended, well or not.
        on_usage: Called from a thread with what each aborted request used: the fields of `Event.USAGE` and `replica`.
        commit_weights: Makes fetched weights visible to other replicas; called before the engine opens a file.
        commit_caches: Makes new caches and records visible to other replicas.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        on_event: Callable[[Event], None] = lambda _: None,
        on_lost: Callable[[], None] = lambda: None,
        on_death: Callable[[EngineError], None] = lambda _: None,
        on_record: Callable[[BootRecord], None] = lambda _: None,
        on_usage: Callable[[dict[str, Any]], None] = lambda _: None,
        commit_weights: Callable[[], None] = lambda: None,
        commit_caches: Callable[[], None] = lambda: None,
    ) -> None:
        self.plan = plan
        self.id = self._prepared_as = records.new_id()
        self.phases = Phases()
        self.ready_after_s: float | None = None
        self.max_model_len: int | None = None  # the context of the engine, once it opens its port
        self.own_key: str | None = None
        self._on_event, self._on_death, self._commit_weights = on_event, on_death, commit_weights
        self._on_usage = on_usage
        self._on_lost = on_lost
        self._results = BootResults(plan, on_record, commit_caches)
        self._at = datetime.now(UTC)
        self._deadline = self._prepared_at = time.monotonic()
        self._restored = self._serving = self._compiled_here = False
        self._serving_lock = threading.Lock()
        self._hardware: Hardware | None = None
        self._weights: store.Weights | None = None
        self._readahead: Readahead | None = None
        self._engine: EngineProcess | None = None

    @property
    def engine(self) -> EngineProcess:
        """The engine process.

        Raises:
            EngineError: Neither `prepare` nor `start` has spawned it yet.
        """
        if self._engine is None:
            raise EngineError(
                f"The replica of model '{self.plan.spec.key}' has no engine yet.", hint="Call prepare(), then start()."
            )
        return self._engine

    def prepare(self) -> None:
        """Do all that may come before a checkpoint; see the module's docstring."""
        with self._stopped_on_failure():
            self.plan.check()
            with self.phases.during("weights"):
                self._weights = store.ensure(self.plan.spec, self.plan.lock)
                if self._weights.fetched:
                    self._commit_weights()
            self._deadline = time.monotonic() + self.plan.startup_timeout_s
            if self.plan.snapshot == "cpu":
                self._load_caches()  # for any hardware: which it will be is not visible here
                self._spawn()
                self.engine.wait_for(State.IMPORTED, self._left_s())
            elif self.plan.snapshot == "gpu":
                self._probe_hardware()
                self._load_caches()
                self._spawn()
                self._read_ahead()
                self._compiled_here = True
                self.engine.wait_for(State.ASLEEP, self._left_s())
        self._prepared_at = time.monotonic()

    def start(self, digests: Mapping[str, str] | None = None, *, restored: bool = False) -> None:
        """Bring the engine to READY; on any failure nothing is left running.

        Args:
            digests: SHA-256 of the keys that are accepted, and the name of each; empty: no key is needed. They come
                this late so that no snapshot holds them.
            restored: An earlier replica prepared, and this one goes on from its snapshot.

        Raises:
            GpuCountError: The model is to be spread over more GPUs than are visible.
            EngineError: The engine died or did not get ready in time.
        """
        self._begin(restored)
        accepted = self._accepted(digests or {})
        with self._stopped_on_failure():
            cold_reason = self._wake(accepted) if self.plan.snapshot == "gpu" else None
            if self.plan.snapshot != "gpu" or cold_reason:
                self._boot(accepted)
            with self._serving_lock:
                self.engine.wait_for(State.READY, 0)  # it may have died since; from here on `on_death` is called
                self._serving = True
            self._record("cold" if cold_reason else "ready", cold_reason)
        self._results.publish_caches(compiled=self._compiled_here)

    def stop(self, grace_s: float | None = None) -> None:
        """Let streams finish within the grace, then end everything. Idempotent; never raises for a dead engine."""
        if self._readahead:
            self._readahead.stop()
        if self._engine:
            self._engine.stop(self.plan.shutdown.drain_s if grace_s is None else grace_s)
        if grace_s is None:
            self._results.flush(self.plan.shutdown.flush_s)

    def load_adapter(self, name: str, directory: Path) -> None:
        """Have the engine load a LoRA adapter while it serves; `EngineProcess.load_adapter` says what it raises."""
        self.engine.load_adapter(name, directory)

    def unload_adapter(self, name: str) -> None:
        """Have it forget one, once the requests of it that run have ended."""
        self.engine.unload_adapter(name, _UNLOAD_S)

    def kill(self) -> EngineError | None:
        """End an engine that no longer listens. Return the cause of its death, of which `on_death` is told too."""
        return self._engine.kill() if self._engine else None

    def _begin(self, restored: bool) -> None:
        """Begin the boot of this replica; under a snapshot, another replica may have prepared it."""
        self._restored = restored
        if restored:
            self._at = datetime.now(UTC)
            if self.id == self._prepared_as:  # the caller may have given it one
                self.id = records.new_id()
            self.phases.begin()
            self._compiled_here = False
            self._deadline = time.monotonic() + self.plan.startup_timeout_s
        elif self.plan.snapshot != "off":
            self.phases.add("restore", self._prepared_at, time.monotonic())

    def _wake(self, accepted: list[str]) -> str | None:
        """Wake the sleeping engine. Return None, or the reason why that failed; the engine is stopped then."""
        within_s = min(self.plan.effective_wake_timeout_s, self._left_s() / 2)
        try:
            self._release(accepted)
            self.engine.wait_for(State.READY, within_s)
        except EngineTimeoutError:
            reason = f"The engine did not wake within {within_s:g} s; it was killed."
        except EngineError as error:
            reason = str(error)
        else:
            return None
        self.engine.stop(0)
        self.engine.wait_ended(self._left_s() / 2)  # the driver frees tens of GB first
        self._engine = self.ready_after_s = None
        _log.warning("boot %s: the engine did not wake as it fell asleep, so it is booted cold. %s", self.id, reason)
        return reason

    def _boot(self, accepted: list[str]) -> None:
        """Build an engine, or let the held one go on, until it is ready."""
        self._read_ahead()
        hardware = self._probe_hardware()
        if self._engine is None:
            self._spawn(hold="imported")
        self._load_caches()  # while it imports
        self._release(accepted)
        self._compiled_here = True
        if self.plan.device == "cuda":
            check_gpu_count(hardware, self.plan.n_gpu, self.plan.spec.key)
        self.engine.wait_for(State.READY, self._left_s())

    def _release(self, accepted: list[str]) -> None:
        self.phases.mark(Event.RELEASED)
        self.engine.release(accepted, self.id, otel.variables(self.plan.parent_env))

    def _accepted(self, digests: Mapping[str, str]) -> list[str]:
        """Return the digests to accept: the users', and where there are any, one for this process alone."""
        if not digests:
            return []
        self.own_key = secrets.token_urlsafe(32)
        return [*digests, digest(self.own_key.encode())]

    def _probe_hardware(self) -> Hardware:
        """Find out what this runs on, which is visible only outside a CPU snapshot, and use the caches that fit it."""
        self._hardware = found = self.plan.hardware or probe()
        if self.plan.caches:
            self.plan.caches.select_hardware(found.fingerprint(self.plan.device))
        if self.plan.failure:
            self.plan.failure.check(self.plan.gpu_label(found))
        return found

    def _load_caches(self) -> None:
        if self.plan.caches:
            with self.phases.during("caches"):
                self.plan.caches.load()

    def _read_ahead(self) -> None:
        assert self._weights is not None, "prepare() comes first"  # noqa: S101 - a programming error, not an input
        if self.plan.device == "cuda":
            self._readahead = Readahead(self._weights.model, self._weights.draft)
        else:  # a CPU engine takes no draft, and has the weights in this same memory
            self._readahead = Readahead(self._weights.model, memory_share=0.4)
        self._readahead.start()

    def _spawn(self, hold: Hold | None = None) -> None:
        assert self._weights is not None, "prepare() comes first"  # noqa: S101 - a programming error, not an input
        plan = self.plan
        command = plan.command(self._weights, sleeps=plan.snapshot == "gpu" and hold is None)
        self.phases.engine_begins()
        self._engine = engine = EngineProcess(
            command,
            python=plan.python,
            hold=_HOLDS[plan.snapshot] if hold is None else hold,
            neutral_imports=plan.snapshot == "cpu" and hold is None,  # Modal shows no GPU while it takes that snapshot
            hang_s=plan.hang_s,
            shutdown=plan.shutdown,
            on_line=self._read,
            on_event=lambda event, fields: self._note(engine, event, fields),
            on_lost=lambda: self._on_lost() if self._serves(engine) else None,
            on_death=lambda error: self._on_death(error) if self._serves(engine) else None,
        )
        engine.spawn()

    def _left_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    @contextmanager
    def _stopped_on_failure(self) -> Iterator[None]:
        """Stop the engine on a failure: Modal runs no exit hook after a hook that failed or was interrupted."""
        try:
            yield
        except BaseException as error:
            self.stop(0)
            self._record("failed", str(error) or type(error).__name__)
            self._results.save_failure(self.plan.gpu_label(self._hardware) if self._hardware else "", error)
            if isinstance(error, ServiceError):
                self._results.commit()
            raise

    def _record(self, outcome: str, reason: str | None) -> None:
        """Record how the boot went; a full disk must not keep the replica from serving."""
        record = self.plan.record(
            self._hardware,
            id=self.id,
            at=self._at.isoformat(timespec="milliseconds"),
            restored=self._restored,
            phases=self.phases.spans(),
            bytes_read=self._readahead.bytes_read if self._readahead else None,
            outcome=outcome,
            reason=reason,
            seconds=round(self.phases.seconds, 3),
        )
        self._results.save(record)

    def _serves(self, engine: EngineProcess) -> bool:
        """Tell whether requests go to this engine."""
        with self._serving_lock:
            return self._serving and engine is self._engine

    def _note(self, engine: EngineProcess, event: Event, fields: dict[str, Any]) -> None:
        if engine is not self._engine:
            return  # it was replaced by a cold boot
        if event is Event.USAGE:
            self._on_usage({**fields, "replica": self.id})
            return
        self.phases.mark(event, fields["at"])
        if event is Event.OPENING:
            self.max_model_len = fields.get("max_model_len")
        if event is Event.READY:
            self.ready_after_s = self.phases.seconds
        if event is Event.LOADED and self._readahead:
            self._readahead.stop()
        for failure in fields.get("failures", ()):
            _log.warning("boot %s: a request of the warm-up failed, %s", self.id, failure)
        self._on_event(event)

    def _read(self, line: str) -> None:
        self.phases.read(line)
        _output.info("%s", line, extra={"model": self.plan.spec.key})
