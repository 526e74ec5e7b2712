"""What a deploy is to be, from settings and registry alone: app name, GPU, secrets, keyword arguments of the class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.errors import UnknownModelError
from service.gpus import Gpu, check_count, find_gpu, tier
from service.models import ModelSpec, Registry
from service.settings import Settings

STARTUP_MARGIN_S = 60  # so that a boot which takes too long is ended, and explained, by us before Modal does
DEFAULT_HUB_SECRET = "huggingface"  # noqa: S105 - the name of a secret, not its value


@dataclass(frozen=True)
class Deployment:
    """The resolved wishes of the deployer. Identical on the deployer's machine and in the container."""

    settings: Settings
    registry: Registry
    spec: ModelSpec
    gpu: Gpu
    n_gpu: int

    @classmethod
    def resolve(cls, environ: Mapping[str, str] | None = None) -> Deployment:
        """Read settings and registry, and fill in what the model's entry decides.

        Raises:
            UsageError: A setting, the models file, the model or the GPU is wrong.
        """
        settings = Settings.load(environ)
        registry = Registry.load(settings.models_file)
        try:
            choice = registry.find(settings.model, Settings.model_fields["model"].default)
        except UnknownModelError as error:
            raise UnknownModelError(f"SERVICE_MODEL: {error}") from error
        spec = choice.spec
        gpu = find_gpu(settings.gpu) if settings.gpu else choice.gpu or spec.gpu_tier
        n_gpu = settings.n_gpu or (spec.n_gpu if gpu == spec.gpu_tier else 1)
        check_count(gpu, n_gpu)
        hub_secret = settings.hub_secret or (DEFAULT_HUB_SECRET if spec.gated else None)
        resolved = settings.model_copy(
            update={"model": spec.key, "gpu": gpu.name, "n_gpu": n_gpu, "hub_secret": hub_secret}
        )
        return cls(resolved, registry, spec, gpu, n_gpu)

    @property
    def app_name(self) -> str:
        """Name of the app: one per GPU tier, `vllm-h100` or `vllm-h200x2`, unless `SERVICE_APP` names it."""
        return self.settings.app or f"vllm-{tier(self.gpu, self.n_gpu)}"

    @property
    def gpu_request(self) -> str:
        """Modal's `gpu=`: `H100` or `H200:2`."""
        return self.gpu.name if self.n_gpu == 1 else f"{self.gpu.name}:{self.n_gpu}"

    @property
    def secrets(self) -> dict[str, list[str]]:
        """Name -> required keys of the secrets that the container gets."""
        found: dict[str, list[str]] = {}
        if self.settings.hub_secret:
            found[self.settings.hub_secret] = ["HF_TOKEN"]
        if self.settings.direct_auth == "keys":
            found[self.settings.keys_secret] = []  # API_KEY or API_KEYS: which of them is checked at the start
        return found

    def class_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `@app.cls` that are plain values."""
        s = self.settings
        options: dict[str, Any] = {
            "gpu": self.gpu_request,
            "scaledown_window": s.scaledown_window,
            "min_containers": s.min_containers,
            "max_containers": s.max_containers,
            "buffer_containers": s.buffer_containers,
            "startup_timeout": s.startup_timeout_s + STARTUP_MARGIN_S,
            "timeout": s.request_timeout_s,
            "region": s.region,
            "enable_memory_snapshot": s.snapshot != "off",
        }
        return {name: value for name, value in options.items() if value}
