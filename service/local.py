"""The service on this machine: the same replica as on Modal, in the foreground, until Ctrl-C.

Without keys it listens on loopback only and refuses any other address.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from service import engine_env, fetch, keys, records, revisions, weights
from service.boot import Replica
from service.caches import Caches
from service.errors import OpenDoorError, ServiceError, UnknownModelError
from service.hardware import check_gpu_count, check_memory, check_port, claim_port, is_loopback, visible_gpus
from service.models import ModelSpec, Registry, looks_like_a_source, unregistered
from service.plan import Plan
from service.settings import Settings

DEFAULT_MODEL = "qwen3-0.6b"
OFFLINE_MODEL = "tiny"
DRAIN_S = 6.0  # streams in flight may go on for so long after Ctrl-C; everything is gone in 10 s
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Screen(Protocol):
    """Where the run shows itself; `cli.py` has the one for terminals."""

    def say(self, text: str) -> None:
        """Show a sentence that stays."""

    def phase(self, text: str) -> None:
        """Show what is being waited for."""

    def engine_line(self, line: str) -> None:
        """Take a line of the engine's output."""


@dataclass(frozen=True)
class Ready:
    """What is being served, and where."""

    spec: ModelSpec
    base_url: str
    seconds: float
    asks_for_key: bool


def choose_model(name: str | None, registry: Registry, say: Callable[[str], None]) -> ModelSpec:
    """Return the model to serve: the named one, or the default one that this machine can get.

    Raises:
        UnknownModelError: The name is in no registry and is neither a hub id nor a model directory.
    """
    if name:
        try:
            return registry.find(name, DEFAULT_MODEL).spec
        except UnknownModelError:
            if not looks_like_a_source(name):
                raise
            return unregistered(name)
    spec = registry.find(DEFAULT_MODEL).spec
    if weights.find(spec) or fetch.hub_in_reach():
        return spec
    say(f"No model hub is in reach, so this serves the built-in '{OFFLINE_MODEL}' model, which knows a few dialogues.")
    return registry.find(OFFLINE_MODEL).spec


def serve(
    model: str | None,
    settings: Settings,
    host: str,
    screen: Screen,
    on_ready: Callable[[Ready], None],
    *,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP, which drain; a second one ends at once. Blocks.

    Raises:
        ServiceError: Something was refused before the engine began, or the engine died.
        KeyboardInterrupt: The signal came before it was ready.
    """
    digests = keys.digests(environ)
    _check_door(host, settings.port, bool(digests))
    with _signals_interrupt(), claim_port(settings.port):
        plan = _plan(model, settings, host, screen, environ)
        _run(plan, digests, screen, on_ready)


def log_file(port: int) -> Path:
    """Return where the engine's output of a run on this port is kept, until the next run."""
    return records.state_directory() / f"engine-{port}.log"


def _plan(model: str | None, settings: Settings, host: str, screen: Screen, environ: Mapping[str, str]) -> Plan:
    """Refuse what cannot work here, and only then build what is missing."""
    registry = revisions.registry(settings.models_file)
    spec = choose_model(model, registry, screen.say)
    gpus = visible_gpus()
    n_gpu = settings.n_gpu or (spec.n_gpu if gpus else 1)
    if gpus or n_gpu > 1:
        check_gpu_count(n_gpu, spec.key)
    else:
        check_memory(spec.weights_gb, spec.key)
    lock_file = revisions.lock_file(settings.models_file) if spec.key in registry.specs else None
    spec = revisions.settle(spec, revisions.asking(fetch.hub_token(environ)), revisions.noting(lock_file, screen.say))
    screen.phase("environment")  # nothing is refused from here on: now things are made
    env = engine_env.ensure(screen.say, "cuda" if gpus else "cpu")
    versions = engine_env.versions(env.device)
    return Plan(
        spec=spec,
        default_key=spec.key,
        device=env.device,
        python=env.python,
        parent_env=environ,
        fast_boot=settings.fast_boot is not False,
        n_gpu=n_gpu,
        host=host,
        port=settings.port,
        startup_timeout_s=settings.startup_timeout_s,
        drain_s=DRAIN_S,
        hang_s=settings.hang_s,
        hub_token=fetch.hub_token(environ),
        versions=versions,
        caches=Caches(engine_env.compiled(), versions, model=spec.key, say=screen.say),
        records=records.local_directory(),
    )


def _check_door(host: str, port: int, has_keys: bool) -> None:
    if not has_keys and not is_loopback(host):
        raise OpenDoorError(
            f"Without keys this serves on loopback only, and '{host}' is reachable from elsewhere. "
            "Set API_KEY=<key> or API_KEYS=name=<key>, or leave --host out."
        )
    check_port(host, port)


def _run(plan: Plan, digests: Mapping[str, str], screen: Screen, on_ready: Callable[[Ready], None]) -> None:
    ended = threading.Event()
    death: list[ServiceError] = []

    def on_death(error: ServiceError) -> None:
        death.append(error)
        ended.set()

    replica = Replica(plan, say=screen.say, on_line=screen.engine_line, on_event=screen.phase, on_death=on_death)
    try:
        screen.phase("weights")
        replica.prepare()
        screen.phase("spawned")
        replica.start(digests)
        on_ready(_ready(plan, replica, bool(digests)))
        ended.wait()
    except KeyboardInterrupt:
        if replica.ready_after_s is None:
            raise
        _drain(replica, screen)
    finally:
        replica.stop(0)
    if death:
        raise death[0]


def _drain(replica: Replica, screen: Screen) -> None:
    screen.phase("draining")
    try:
        replica.stop()
    except KeyboardInterrupt:  # asked a second time
        replica.stop(0)


def _ready(plan: Plan, replica: Replica, asks_for_key: bool) -> Ready:
    host = f"[{plan.host}]" if ":" in plan.host else plan.host
    return Ready(plan.spec, f"http://{host}:{plan.port}/v1", replica.ready_after_s or 0.0, asks_for_key)


class _signals_interrupt:  # noqa: N801 - a context manager, used like a function
    """Make SIGTERM and SIGHUP interrupt as Ctrl-C does, and put back what was there."""

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, _interrupt) for number in _SIGNALS}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
