"""Plans replicas on this machine: which model, whether it fits, and with what settings its engine runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from service.boots import records
from service.engine import cpu, environment, parsers
from service.engine.installer import InstallProgress
from service.engine.model_files import ModelFiles
from service.engine.shutdown import LOCAL_SHUTDOWN
from service.errors import EngineError, HubUnreachableError, WeightsError
from service.gateway.local_scheduler import LocalScheduler
from service.gateway.pool import OnWake
from service.hardware import check_gpu_count, check_gpu_memory, probe
from service.in_engine.vllm_service.events import Event
from service.local.adapter_file import adapter_file
from service.memory import available_bytes, check_memory
from service.registry.models import ModelSpec, Registry, resolve_or_source
from service.replica.compile_caches import Caches
from service.replica.lifecycle import Replica
from service.replica.plan import Plan
from service.settings import Settings
from service.usage import money
from service.usage.ledger import Ledger
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
        HubUnreachableError: None is named, and the proxy or the certificates on the way to the hub are set up wrongly.
    """
    if name:
        return resolve_or_source(registry, name, DEFAULT_MODEL).spec
    spec = registry.resolve(DEFAULT_MODEL).spec
    unreachable = None if store.find(spec) else hub.DEFAULT.why_unreachable()
    if unreachable is None:
        return spec
    if not unreachable.is_offline:  # the user expects the hub: to serve another model instead would hide what is wrong
        raise HubUnreachableError(
            f"'{spec.key}' cannot be fetched from {hub.DEFAULT.url}, which is not in reach: {unreachable.reason}.",
            hint=f"{unreachable.hint} The built-in model '{OFFLINE_MODEL}' needs no hub: name it.",
        )
    _log.info(
        "No model hub is in reach (%s: %s), so this serves the built-in '%s' model, which knows a few dialogues.",
        hub.DEFAULT.url,
        unreachable.reason,
        OFFLINE_MODEL,
    )
    return registry.resolve(OFFLINE_MODEL).spec


class LocalPlanner:
    """Plans replicas of registry entries on this machine.

    Args:
        settings: Of this run.
        reporter: Shows how far the start is.
        environ: The environment of this run; engines inherit some of its variables.
        ledger: Takes what aborted requests used.
    """

    def __init__(
        self,
        settings: Settings,
        reporter: ProgressReporter,
        environ: Mapping[str, str],
        ledger: Ledger | None = None,
    ) -> None:
        self.settings, self.reporter, self.environ, self._ledger = settings, reporter, environ, ledger
        self.adapter_file = adapter_file(settings.port)
        self.registry = self._read_files()
        self.hardware = probe()
        self.gpus = len(self.hardware.gpus)
        self._files: dict[str, ModelFiles] = {}
        self._unlisted: ModelSpec | None = None

    def resolve(self, model: str | None) -> ModelSpec:
        """Return the model to start with; one that the registry lacks is added, and replaces an entry of its key."""
        spec = resolve_model(model, self.registry)
        if self.registry.specs.get(spec.key) != spec:
            self._unlisted = spec
            self.registry = self._with_unlisted(self.registry)
        return spec

    def read_models(self, default: str) -> Registry:
        """Read the models again; `take_models` uses them.

        Raises:
            UsageError: The models file is wrong, or has no default model any more.
        """
        registry = self._with_unlisted(self._read_files())
        registry.resolve(default)
        return registry

    def _read_files(self) -> Registry:
        return self.adapter_file.merge(revisions.registry(self.settings.models_file))

    def take_models(self, registry: Registry) -> None:
        """Plan with other models from now on."""
        self.registry, self._files = registry, {}

    def _with_unlisted(self, registry: Registry) -> Registry:
        """Return a registry with the model that was named at the start and is in no models file."""
        spec = self._unlisted
        return registry.replace({**registry.specs, spec.key: spec}) if spec else registry

    def n_gpu(self, spec: ModelSpec) -> int:
        """Return how many of this machine's GPUs the model takes."""
        return self.settings.n_gpu or (spec.n_gpu if self.gpus else 1)

    def check(self, spec: ModelSpec) -> None:
        """Refuse a model that this machine cannot serve, before anything is built.

        Raises:
            WeightsError: The size of its weights is not known, and the hub does not tell it.
            ServiceError: As `check_known` does.
        """
        self.check_known(spec)
        if not (self.gpus or spec.weights_gb):
            check_memory(store.size_gb(spec), spec.key)

    def check_known(self, spec: ModelSpec) -> None:
        """Refuse such a model by what is known without a request to the hub.

        Raises:
            GpuCountError: It takes more GPUs than are visible.
            GpuMemoryError: Its weights are more than their memory.
            MemoryTooSmallError: Without a GPU, its weights are more than the memory that may be used.
            ContextMemoryError: Without a GPU, the KV cache of its entry's own context does not fit beside the weights.
        """
        if self.gpus or self.n_gpu(spec) > 1:
            check_gpu_count(self.hardware, self.n_gpu(spec), spec.key)
            check_gpu_memory(self.hardware, self.n_gpu(spec), spec.weights_gb, spec.key)
            return
        check_memory(spec.weights_gb, spec.key)
        if (spec.cpu_max_model_len or not spec.weights_gb) and (files := self.files(spec)):
            check_memory(files.weights_bytes / 1e9, spec.key)
            cpu.check_context(spec, files)

    def files(self, spec: ModelSpec) -> ModelFiles | None:
        """Return what the files of a model say, read once; None: they are not here."""
        if spec.key not in self._files:
            try:
                weights = store.find(spec)
            except WeightsError:
                weights = None
            if weights is None:
                return None
            self._files[spec.key] = ModelFiles.read(weights.model, spec.chat_template_file)
        return self._files[spec.key]

    def max_model_len(self, spec: ModelSpec) -> int | None:
        """Return the context that an engine of the model would have here; None: it is not known yet."""
        if not self.gpus:
            known = spec.cpu_max_model_len or spec.max_model_len
            return cpu.max_model_len(spec, None if known else self.files(spec))
        if spec.max_model_len:
            return spec.max_model_len
        files = self.files(spec)
        return files.max_model_len if files else None

    def lacks_tool_parser(self, spec: ModelSpec) -> bool:
        """Tell whether an engine of the model is certain to have no tool parser."""
        return parsers.lacks_tool_parser(spec, None if spec.tool_call_parser else self.files(spec))

    def fetch(self, spec: ModelSpec) -> None:
        """Fetch the weights of a model that was requested."""
        self.check(spec)
        store.ensure(self._settled(spec))

    def adapters(self, spec: ModelSpec, fetch: bool) -> Mapping[str, Path]:
        """Return the directories of a model's adapters, each checked; those that are not here are fetched if wanted.

        Raises:
            WeightsError: One cannot be fetched, or is none that the model's engine could serve.
        """
        return store.ensure_adapters(self._settled(spec)) if fetch else store.find_adapters(spec)

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
        return Replica(self.plan(spec, port, gpus), on_death=on_death, on_usage=self.usage_recorder(spec))

    def usage_recorder(self, spec: ModelSpec) -> Callable[[dict[str, Any]], None]:
        """Return what takes the usage of a model's aborted requests."""

        def record(fields: dict[str, Any]) -> None:
            if self._ledger:
                self._ledger.record(money.aborted_request(fields, spec))

        return record

    def scheduler(self, on_wake: OnWake) -> LocalScheduler:
        """Return the scheduler of this machine's engines, of which none runs yet.

        Args:
            on_wake: Called after each wake of a pool.
        """
        return LocalScheduler(
            self.fetch,
            self.replica,
            free_memory=available_bytes,
            needs_memory=lambda spec: cpu.memory_bytes(spec, self.files(spec)),
            check=self.check_known,
            max_model_len=self.max_model_len,
            lacks_tool_parser=self.lacks_tool_parser,
            boots=lambda: records.load(records.local_directory()),
            gpus=tuple(range(self.gpus)),
            n_gpu=self.n_gpu,
            adapters=self.adapters,
            idle_s=self.settings.scaledown_window,
            on_wake=on_wake,
        )

    def _settled(self, spec: ModelSpec) -> ModelSpec:
        is_entry = spec != self._unlisted and self.registry.specs.get(spec.key) == spec
        file = revisions.lock_file(self.settings.models_file) if is_entry else None  # else the cache's record has it
        return revisions.resolve_revisions(spec, revisions.RevisionResolver(), revisions.lock_writer(file))


def _visible(gpus: tuple[int, ...]) -> dict[str, str]:
    """Return the variable that gives an engine its GPUs, out of those that this process may use."""
    if not gpus:
        return {}
    mine = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine[gpu] if len(mine) > gpu and mine[gpu] else str(gpu) for gpu in gpus)}
