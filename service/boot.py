"""One replica's life, the same on Modal and on a laptop: prepare, (checkpoint), start, stop.

`snapshot` says how far `prepare` goes before a checkpoint may be taken:
- `off`: the weights are there; nothing is running.
- `cpu`: the engine's program is running, has imported what asks for no GPU, and is held with no socket open.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from service import weights
from service.engine import EngineProcess, State
from service.engine_args import SHUTDOWN_TIMEOUT_S, engine_command
from service.errors import EngineError
from service.hardware import check_gpu_count
from service.models import ModelSpec

Snapshot = Literal["off", "cpu"]


@dataclass(frozen=True)
class Plan:
    """What a replica is to be.

    Attributes:
        spec: The model.
        default_key: Key of the model that `llm` stands for.
        device: `cuda` or `cpu`.
        python: Interpreter of the environment that has vLLM.
        parent_env: Environment handed on to the engine, less secrets and settings.
    """

    spec: ModelSpec
    default_key: str
    device: str
    python: str
    parent_env: Mapping[str, str]
    snapshot: Snapshot = "off"
    fast_boot: bool = True
    n_gpu: int = 1
    host: str = "127.0.0.1"
    port: int = 8000
    startup_timeout_s: float = 1800
    shutdown_timeout_s: int = SHUTDOWN_TIMEOUT_S
    hub_token: str | None = field(default=None, repr=False)


class Replica:
    """One engine and the order in which it is brought up. Methods block.

    Args:
        plan: What it is to be.
        say: Called with a sentence for people when something takes its time.
        on_line: Called with every line of the engine's output, from a thread.
        on_event: Called with the name of each phase that the engine has passed, from a thread.
        on_death: Called once, from a thread, when the engine dies after it was ready; before, `start` raises.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        say: Callable[[str], None] = lambda _: None,
        on_line: Callable[[str], None] | None = None,
        on_event: Callable[[str], None] = lambda _: None,
        on_death: Callable[[EngineError], None] | None = None,
    ) -> None:
        self.plan = plan
        self.phases: dict[str, float] = {}
        self.own_key: str | None = None
        self._say, self._on_line, self._on_event, self._on_death = say, on_line, on_event, on_death
        self._began = time.monotonic()
        self._weights: weights.Weights | None = None
        self._engine: EngineProcess | None = None

    @property
    def engine(self) -> EngineProcess:
        """The engine process.

        Raises:
            EngineError: `prepare` and `start` have not come yet.
        """
        if self._engine is None:
            raise EngineError("There is no engine yet: prepare() and start() come first.")
        return self._engine

    def prepare(self, share: Callable[[], None] = lambda: None) -> None:
        """Do all that may come before a checkpoint; see the module's docstring.

        Args:
            share: Called when weights were fetched, before the engine opens any: makes the cache's news seen elsewhere.
        """
        self._weights = weights.ensure(self.plan.spec, self.plan.hub_token, self._say)
        if self._weights.fetched:
            share()
        self._mark("weights")
        if self.plan.snapshot == "cpu":
            with self._nothing_left_on_failure():
                self._spawn(hold=True)
                self.engine.wait_for(State.IMPORTED, self.plan.startup_timeout_s)

    def start(self, digests: Mapping[str, str] | None = None) -> None:
        """Bring the engine to READY; on any failure nothing is left running.

        Args:
            digests: SHA-256 of the keys that are accepted, by name; empty: no key is asked for. They come this late so
                that no snapshot holds them.

        Raises:
            GpuCountError: The model is to be spread over more GPUs than are visible.
            EngineError: The engine died or did not get ready in time.
        """
        with self._nothing_left_on_failure():
            if self._engine is None:
                self._spawn(hold=False)
            self.engine.release(self._accepted(digests or {}))
            if self.plan.device == "cuda":  # while the engine is on its way
                check_gpu_count(self.plan.n_gpu, self.plan.spec.key)
            self.engine.wait_for(State.READY, self.plan.startup_timeout_s)

    def stop(self, grace_s: float | None = None) -> None:
        """Let streams finish within the grace, then end everything. Idempotent; never raises for a dead engine."""
        if self._engine:
            self._engine.stop(self.plan.shutdown_timeout_s + 2 if grace_s is None else grace_s)

    def _accepted(self, digests: Mapping[str, str]) -> list[str]:
        """Return the digests to accept: the users', and where those ask for a key, one for this process alone."""
        if not digests:
            return []
        self.own_key = secrets.token_urlsafe(32)
        return [*digests.values(), hashlib.sha256(self.own_key.encode()).hexdigest()]

    def _spawn(self, *, hold: bool) -> None:
        assert self._weights is not None, "prepare() comes first"  # noqa: S101 - a programming error, not an input
        plan = self.plan
        command = engine_command(
            plan.spec,
            self._weights.model,
            draft=self._weights.draft,
            default_key=plan.default_key,
            device=plan.device,
            n_gpu=plan.n_gpu,
            fast_boot=plan.fast_boot,
            host=plan.host,
            port=plan.port,
            shutdown_timeout_s=plan.shutdown_timeout_s,
            parent_env=plan.parent_env,
        )
        self._engine = EngineProcess(
            command,
            python=plan.python,
            hold="imported" if hold else "",
            neutral_imports=hold,
            on_line=self._on_line,
            on_event=self._note,
            on_death=self._died,
        )
        self._mark("spawned")
        self._engine.spawn()

    @contextmanager
    def _nothing_left_on_failure(self) -> Iterator[None]:
        """Modal runs no exit hook after a hook that failed or was interrupted: end the engine here."""
        try:
            yield
        except BaseException:
            self.stop(0)
            raise

    def _died(self, error: EngineError) -> None:
        if "ready" in self.phases and self._on_death:
            self._on_death(error)

    def _mark(self, phase: str) -> None:
        self.phases[phase] = round(time.monotonic() - self._began, 3)

    def _note(self, event: str, fields: dict[str, Any]) -> None:
        self.phases[event] = round(fields["at"] - self._began, 3)
        self._on_event(event)
