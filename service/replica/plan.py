"""The plan of a replica: model, engine, strategy, and how long each step may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from service.boots.failures import FailureFile
from service.boots.records import BootRecord
from service.engine import cpu
from service.engine.args import EngineCommand, EngineOptions, engine_command
from service.engine.model_files import ModelFiles
from service.engine.process import HANG_S
from service.errors import GpuCountError
from service.hardware import Hardware
from service.registry.models import ModelSpec
from service.registry.tiers import count_label
from service.replica.compile_caches import Caches
from service.settings import Settings
from service.weights.locks import Lock
from service.weights.store import Weights

Snapshot = Literal["off", "cpu", "gpu"]
WAKE_S, WAKE_S_PER_GB = 30.0, 1.0  # a restore reads memory back page by page, at 1 GB/s or more
_UNKNOWN_GB = 100.0


@dataclass(frozen=True)
class Plan(EngineOptions):
    """How one replica is to run: the options of its engine, and what the engine itself does not get.

    Attributes:
        spec: The model.
        default_key: Key of the model that `llm` stands for.
        device: `cuda` or `cpu`.
        python: Interpreter of the environment that has vLLM.
        hardware: What the engine runs on; None: the replica probes it, under a CPU snapshot after the restore.
        parent_env: The parent's environment, of which the engine inherits some variables.
        snapshot: How far `prepare` goes.
        startup_timeout_s: How long a boot may take once the weights are there.
        wake_timeout_s: How long waking may take before the engine is booted cold; None: by the size of the weights.
        lock: Serialises fetches of the same weights across replicas; None: across processes of this machine.
        hang_s: How long a ready engine may emit no heartbeat before it is killed.
        versions: Versions of what the engine consists of, for the record.
        caches: Where the engine's compile caches are.
        records: Directory of the boots' records.
        failure: Where a boot that cannot work is recorded; None: it is not.
    """

    spec: ModelSpec
    default_key: str
    device: str
    python: str
    parent_env: Mapping[str, str]
    snapshot: Snapshot = "off"
    startup_timeout_s: float = 1800
    wake_timeout_s: float | None = None
    hang_s: float = HANG_S
    hardware: Hardware | None = None
    lock: Lock | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    caches: Caches | None = None
    records: Path | None = None
    failure: FailureFile | None = None

    @classmethod
    def from_settings(cls, settings: Settings, **facts: Any) -> Plan:
        """Return a plan whose fields come from the settings of the same names.

        Args:
            settings: Of the deploy or the run.
            facts: The other fields, and those that replace a setting.
        """
        shared = {field.name for field in fields(cls)} & Settings.model_fields.keys()
        return cls(**({name: getattr(settings, name) for name in shared} | facts))

    def check(self) -> None:
        """Refuse a plan that cannot work.

        Raises:
            GpuCountError: A GPU memory snapshot of several GPUs.
            RecordedFailureError: An earlier boot with it failed, on whatever GPU.
        """
        if self.failure:
            self.failure.check()
        if self.snapshot == "gpu" and self.n_gpu > 1:
            raise GpuCountError(
                f"A GPU memory snapshot works on one GPU, and '{self.spec.key}' is to run on {self.n_gpu}.",
                hint="Deploy a tier of its own with SERVICE_SNAPSHOT=cpu.",
            )

    def command(self, weights: Weights, *, sleeps: bool) -> EngineCommand:
        """Return how the engine is started.

        Args:
            weights: The model's.
            sleeps: It is to be in sleep mode before it serves.

        Raises:
            ContextMemoryError: The machine has no memory for the context that the entry wants of a CPU engine.
        """
        files = ModelFiles.read(weights.model, self.spec.chat_template_file)
        if self.device == "cpu":
            cpu.check_context(self.spec, files)
        return engine_command(
            self.spec,
            weights.model,
            self,
            files=files,
            draft=weights.draft,
            adapters=weights.adapters,
            default_key=self.default_key,
            device=self.device,
            sleeps=sleeps,
            parent_env={**self.parent_env, **(self.caches.env() if self.caches else {})},
        )

    def record(self, hardware: Hardware | None, **facts: Any) -> BootRecord:
        """Return the record of a boot with this plan.

        Args:
            hardware: What it ran on; None where it ended before that was known.
            facts: The fields of the record that the plan does not know.
        """
        return BootRecord(
            model=self.spec.key,
            revision=self.spec.revision,
            gpu=self.gpu_label(hardware),
            strategy=self.snapshot,
            fast_boot=self.fast_boot,
            versions=self.versions,
            **facts,
        )

    @property
    def effective_wake_timeout_s(self) -> float:
        """How long waking may take before the engine is booted cold instead."""
        if self.wake_timeout_s is not None:
            return self.wake_timeout_s
        return WAKE_S + WAKE_S_PER_GB * (self.spec.weights_gb or _UNKNOWN_GB)

    def gpu_label(self, hardware: Hardware | None) -> str:
        """Return what it runs on, such as `cpu`, `NVIDIA L4` or `2 x NVIDIA H200`."""
        if self.device == "cpu":
            return "cpu"
        name = hardware.gpus[0].name if hardware and hardware.gpus else self.device
        return count_label(name, self.n_gpu)
