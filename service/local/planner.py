"""What this machine makes of a registry entry: whether it can serve it, and the plan of a replica that does."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Protocol

from service.boots import records
from service.engine import environment
from service.engine.args import cpu_memory_bytes
from service.engine.shutdown import LOCAL_SHUTDOWN
from service.errors import EngineError, UnknownModelError
from service.gateway.local_pool import Machine
from service.gateway.pool import OnWake
from service.hardware import available_bytes, check_gpu_count, check_memory, visible_gpus
from service.registry.models import ModelSpec, Registry, looks_like_a_source, unregistered
from service.replica.compile_caches import Caches
from service.replica.lifecycle import Replica
from service.replica.plan import Plan
from service.settings import Settings
from service.weights import download_process, revisions, store

DEFAULT_MODEL = "qwen3-0.6b"
OFFLINE_MODEL = "tiny"


class Screen(Protocol):
    """Where the run shows itself; `cli.py` has the one for terminals."""

    def say(self, text: str) -> None:
        """Show a sentence that stays."""

    def phase(self, text: str) -> None:
        """Show what is being waited for."""

    def engine_line(self, line: str) -> None:
        """Take a line of the engine's output."""


def choose_model(name: str | None, registry: Registry, say: Callable[[str], None]) -> ModelSpec:
    """Return the model to serve: the named one, or the default one that this machine can get.

    Raises:
        UnknownModelError: The name is in no registry and is neither a hub id nor a model directory.
    """
    if name:
        try:
            return registry.resolve(name, DEFAULT_MODEL).spec
        except UnknownModelError:
            if not looks_like_a_source(name):
                raise
            return unregistered(name)
    spec = registry.resolve(DEFAULT_MODEL).spec
    if store.find(spec) or download_process.hub_in_reach():
        return spec
    say(f"No model hub is in reach, so this serves the built-in '{OFFLINE_MODEL}' model, which knows a few dialogues.")
    return registry.resolve(OFFLINE_MODEL).spec


class Here:
    """What this machine makes of registry entries: plans, and replicas by them.

    Args:
        settings: The run's.
        screen: Where it shows itself.
        environ: What engines are handed on, less secrets and settings.
    """

    def __init__(self, settings: Settings, screen: Screen, environ: Mapping[str, str]) -> None:
        self.settings, self.screen, self.environ = settings, screen, environ
        self.registry = revisions.registry(settings.models_file)
        self.gpus = visible_gpus()

    def choose(self, model: str | None) -> ModelSpec:
        """Return the model to begin with, which every name of it means from here on."""
        spec = choose_model(model, self.registry, self.screen.say)
        if spec.key not in self.registry.specs:
            self.registry = Registry({**self.registry.specs, spec.key: spec})
        return spec

    def n_gpu(self, spec: ModelSpec) -> int:
        """Return how many of this machine's GPUs the model takes."""
        return self.settings.n_gpu or (spec.n_gpu if self.gpus else 1)

    def check(self, spec: ModelSpec) -> None:
        """Refuse what cannot work here, before anything is made."""
        if self.gpus or self.n_gpu(spec) > 1:
            check_gpu_count(self.n_gpu(spec), spec.key)
        else:
            check_memory(spec.weights_gb, spec.key)

    def fetch(self, spec: ModelSpec) -> None:
        """Fetch the weights of a model that somebody asked for."""
        self.check(spec)
        store.ensure(self._settled(spec), download_process.hub_token(self.environ), self.screen.say)

    def plan(self, spec: ModelSpec, port: int, gpus: tuple[int, ...] = ()) -> Plan:
        """Return what a replica of the model is to be; builds what is missing."""
        self.check(spec)
        spec = self._settled(spec)
        self.screen.phase("environment")  # nothing is refused from here on: now things are made
        env = environment.ensure(self.screen.say, "cuda" if self.gpus else "cpu")
        versions = environment.versions(env.device)
        return Plan(
            spec=spec,
            default_key=spec.key,
            device=env.device,
            python=env.python,
            parent_env={**self.environ, **_visible(gpus)},
            fast_boot=self.settings.fast_boot is not False,
            n_gpu=self.n_gpu(spec),
            host="127.0.0.1",
            port=port,
            startup_timeout_s=self.settings.startup_timeout_s,
            shutdown=LOCAL_SHUTDOWN,
            hang_s=self.settings.hang_s,
            hub_token=download_process.hub_token(self.environ),
            versions=versions,
            caches=Caches(environment.compiled(), versions, model=spec.key, say=self.screen.say),
            records=records.local_directory(),
        )

    def replica(
        self, spec: ModelSpec, port: int, gpus: tuple[int, ...], on_death: Callable[[EngineError], None]
    ) -> Replica:
        """Return a replica of a model that somebody asked for."""
        screen = self.screen
        return Replica(
            self.plan(spec, port, gpus),
            say=screen.say,
            on_line=lambda line: screen.engine_line(f"{spec.key}: {line}"),
            on_death=on_death,
        )

    def machine(self, on_wake: OnWake) -> Machine:
        """Return the engines of this machine, of which none runs yet; `on_wake` is called after each wake of a pool."""
        return Machine(
            self.fetch,
            self.replica,
            free_memory=available_bytes,
            needs_memory=cpu_memory_bytes,
            gpus=tuple(range(self.gpus)),
            n_gpu=self.n_gpu,
            idle_s=self.settings.scaledown_window,
            on_wake=on_wake,
            say=self.screen.say,
        )

    def _settled(self, spec: ModelSpec) -> ModelSpec:
        file = revisions.lock_file(self.settings.models_file) if spec.key in self.registry.specs else None
        asking = revisions.asking(download_process.hub_token(self.environ))
        return revisions.settle(spec, asking, revisions.noting(file, self.screen.say))


def _visible(gpus: tuple[int, ...]) -> dict[str, str]:
    """Return the variable that shows an engine its GPUs, of those that this process may use."""
    if not gpus:
        return {}
    mine = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine[gpu] if len(mine) > gpu and mine[gpu] else str(gpu) for gpu in gpus)}
