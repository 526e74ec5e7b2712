"""Plans replicas on this machine: which model, whether it fits, and with what settings its engine runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Protocol

from service.boots import records
from service.engine import environment
from service.engine.args import cpu_memory_bytes
from service.engine.installer import InstallProgress
from service.engine.shutdown import LOCAL_SHUTDOWN
from service.errors import EngineError, UnknownModelError
from service.gateway.local_scheduler import LocalScheduler
from service.gateway.pool import OnWake
from service.hardware import available_bytes, check_gpu_count, check_memory, probe
from service.in_engine.vllm_service.events import Event
from service.registry.models import ModelSpec, Registry, looks_like_a_source, unregistered
from service.replica.compile_caches import Caches
from service.replica.lifecycle import Replica
from service.replica.plan import Plan
from service.settings import Settings
from service.weights import hub, revisions, store

_log = logging.getLogger(__name__)
DEFAULT_MODEL = "qwen3-0.6b"
OFFLINE_MODEL = "tiny"


class ProgressReporter(Protocol):
    """Shows how far the start is; `cli.terminal` has the one for terminals. Sentences for people are log records."""

    def phase(self, event: Event) -> None:
        """Show what is being waited for."""

    def installing(self, progress: InstallProgress) -> None:
        """Show how far the installation of the engine's environment is."""


def resolve_model(name: str | None, registry: Registry) -> ModelSpec:
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
    if store.find(spec) or hub.DEFAULT.is_reachable():
        return spec
    _log.info(
        "No model hub is in reach, so this serves the built-in '%s' model, which knows a few dialogues.", OFFLINE_MODEL
    )
    return registry.resolve(OFFLINE_MODEL).spec


class LocalPlanner:
    """Plans replicas of registry entries on this machine.

    Args:
        settings: Of this run.
        reporter: Shows how far the start is.
        environ: The environment that engines inherit, less secrets and settings.
    """

    def __init__(self, settings: Settings, reporter: ProgressReporter, environ: Mapping[str, str]) -> None:
        self.settings, self.reporter, self.environ = settings, reporter, environ
        self.registry = revisions.registry(settings.models_file)
        self.hardware = probe()
        self.gpus = len(self.hardware.gpus)

    def resolve(self, model: str | None) -> ModelSpec:
        """Return the model to start with; one that the registry lacks is added to it."""
        spec = resolve_model(model, self.registry)
        if spec.key not in self.registry.specs:
            self.registry = Registry({**self.registry.specs, spec.key: spec})
        return spec

    def n_gpu(self, spec: ModelSpec) -> int:
        """Return how many of this machine's GPUs the model takes."""
        return self.settings.n_gpu or (spec.n_gpu if self.gpus else 1)

    def check(self, spec: ModelSpec) -> None:
        """Refuse a model that this machine cannot serve, before anything is built.

        Raises:
            GpuCountError: It takes more GPUs than are visible.
            MemoryTooSmallError: Without a GPU, its weights are more than the memory.
        """
        if self.gpus or self.n_gpu(spec) > 1:
            check_gpu_count(self.hardware, self.n_gpu(spec), spec.key)
        else:
            check_memory(self.hardware, spec.weights_gb, spec.key)

    def fetch(self, spec: ModelSpec) -> None:
        """Fetch the weights of a model that was requested."""
        self.check(spec)
        store.ensure(self._settled(spec))

    def plan(self, spec: ModelSpec, port: int, gpus: tuple[int, ...] = ()) -> Plan:
        """Return the plan of a replica of the model; builds the engine's environment where it is missing."""
        self.check(spec)
        spec = self._settled(spec)
        self.reporter.phase(Event.ENVIRONMENT)  # all checks have passed: from here on things are built
        env = environment.ensure(on_progress=self.reporter.installing, hardware=self.hardware)
        versions = environment.versions(env.device)
        return Plan.from_settings(
            self.settings,
            spec=spec,
            default_key=spec.key,
            device=env.device,
            python=env.python,
            hardware=self.hardware,
            parent_env={**self.environ, **_visible(gpus)},
            snapshot="off",
            fast_boot=self.settings.fast_boot is not False,
            n_gpu=self.n_gpu(spec),
            port=port,
            shutdown=LOCAL_SHUTDOWN,
            versions=versions,
            caches=Caches(environment.compile_cache_dir(), versions, model=spec.key),
            records=records.local_directory(),
        )

    def replica(
        self, spec: ModelSpec, port: int, gpus: tuple[int, ...], on_death: Callable[[EngineError], None]
    ) -> Replica:
        """Return a replica of a model that was requested."""
        return Replica(self.plan(spec, port, gpus), on_death=on_death)

    def scheduler(self, on_wake: OnWake) -> LocalScheduler:
        """Return the scheduler of this machine's engines, of which none runs yet.

        Args:
            on_wake: Called after each wake of a pool.
        """
        return LocalScheduler(
            self.fetch,
            self.replica,
            free_memory=available_bytes,
            needs_memory=cpu_memory_bytes,
            gpus=tuple(range(self.gpus)),
            n_gpu=self.n_gpu,
            idle_s=self.settings.scaledown_window,
            on_wake=on_wake,
        )

    def _settled(self, spec: ModelSpec) -> ModelSpec:
        file = revisions.lock_file(self.settings.models_file) if spec.key in self.registry.specs else None
        return revisions.resolve_revisions(spec, revisions.RevisionResolver(), revisions.lock_writer(file))


def _visible(gpus: tuple[int, ...]) -> dict[str, str]:
    """Return the variable that gives an engine its GPUs, out of those that this process may use."""
    if not gpus:
        return {}
    mine = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine[gpu] if len(mine) > gpu and mine[gpu] else str(gpu) for gpu in gpus)}
