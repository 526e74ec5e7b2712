"""Resolves a deploy from settings and registry: app name, GPU, secrets, keyword arguments of the class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from service.errors import ServiceError, SettingsError, UnknownModelError, UsageError
from service.keys import digests
from service.modal_app.digests import Digest
from service.registry.gpus import find_gpu
from service.registry.models import ModelChoice, ModelSpec, Registry
from service.registry.tiers import Tier, check_fit, tier_of
from service.settings import Settings
from service.weights import revisions

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.weights.locks import Lock

STARTUP_MARGIN_S = 60  # a boot that takes too long is ended here, with its reason, before Modal ends the container
DEFAULT_HUB_SECRET = "huggingface"  # noqa: S105 - the name of a secret, not its value


@dataclass(frozen=True)
class Deployment:
    """What a deploy publishes. Identical on the deployer's machine and in the container.

    Attributes:
        settings: With what the model's entry decides filled in.
        registry: With the commits of the lock files.
        spec: The default model.
        tier: The GPUs of a replica.
    """

    settings: Settings
    registry: Registry
    spec: ModelSpec
    tier: Tier

    @classmethod
    def resolve(cls, environ: Mapping[str, str] | None = None) -> Deployment:
        """Read settings and registry, and fill in what the model's entry decides.

        Raises:
            UsageError: A setting, the models file, the model or the GPU is wrong, or the model does not fit on the GPU.
        """
        settings = Settings.load(environ)
        registry = revisions.registry(settings.models_file)
        choice = default_model(settings, registry)
        spec = choice.spec
        tier = tier_of(spec, find_gpu(settings.gpu) if settings.gpu else choice.gpu, settings.n_gpu)
        check_fit(spec, tier, lambda other: other.settings)
        _check_snapshot(settings.snapshot, tier.n_gpu)
        fast_boot = settings.snapshot != "gpu" if settings.fast_boot is None else settings.fast_boot
        resolved = settings.model_copy(
            update={
                "model": spec.key,
                "gpu": tier.gpu.name,
                "n_gpu": tier.n_gpu,
                "fast_boot": fast_boot,
                "hub_secret": hub_secret([spec], settings.hub_secret),
            }
        )
        return cls(resolved, registry, spec, tier)

    def with_hub_secret(self, why_missing: Callable[[str], str | None]) -> Deployment:
        """Attach the secret with HF_TOKEN where any entry is gated: a deploy serves every model of the registry.

        Args:
            why_missing: Returns why Modal has no secret of this name with HF_TOKEN; None when it has one.

        Raises:
            ServiceError: It is missing, and the default model is gated or the user named the secret.
        """
        required = self.settings.hub_secret
        secret = hub_secret(self.registry.specs.values(), required)
        if secret and (why := why_missing(secret)):
            if required:
                raise missing_hub_secret(secret, why)
            secret = None
        return replace(self, settings=self.settings.model_copy(update={"hub_secret": secret}))

    def spec_for_replica(self, name: str, lock: Lock) -> ModelSpec:
        """Return the model of a replica, with the commits that all replicas serve.

        Raises:
            UnknownModelError: No entry has the name.
            WeightsError: An entry names no commit, none is recorded, and the hub is not in reach.
        """
        spec = self.registry.resolve(name, self.settings.model).spec
        return revisions.resolve_revisions(spec, revisions.RevisionResolver(), revisions.lock_writer(None), lock=lock)

    def key_on_tier(self, name: str) -> str:
        """Return the key of a model that this tier can serve.

        Raises:
            UnknownModelError: No entry has the name.
            UsageError: The name has another GPU.
            GpuFitError: It cannot run on this tier.
        """
        choice = self.registry.resolve(name, self.settings.model)
        if choice.gpu and choice.gpu != self.tier.gpu:
            raise UsageError(
                f"Model '{name}' names {choice.gpu.name}, and this app's GPU is {self.tier.label}.",
                hint=f"Set SERVICE_GPU={choice.gpu.name}, or leave the GPU out of the name.",
            )
        check_fit(choice.spec, self.tier, lambda other: other.settings)
        return choice.spec.key

    def boot_digest(self, spec: ModelSpec, **arguments: Any) -> str:
        """Return what a boot of this deploy consists of: image, model, and arguments of the class."""
        parts = Digest.of_tier(self.settings, [spec], [])
        return "-".join((parts.settings, parts.entries, parts.code, *(f"{k}={v}" for k, v in arguments.items())))

    @property
    def app_name(self) -> str:
        """Name of the app: one per GPU tier, `vllm-h100` or `vllm-h200x2`, unless `SERVICE_APP` names it."""
        return self.settings.app or self.tier.app_name

    @property
    def fast_boot(self) -> bool:
        """Whether replicas skip compilation and CUDA graphs. A GPU snapshot holds both, so under it they do not."""
        return bool(self.settings.fast_boot)

    @property
    def secrets(self) -> dict[str, list[str]]:
        """Name -> required keys of the secrets that the container gets."""
        found: dict[str, list[str]] = {}
        if self.settings.hub_secret:
            found[self.settings.hub_secret] = ["HF_TOKEN"]
        if self.settings.direct_auth == "keys":
            found[self.settings.keys_secret] = []  # API_KEY or API_KEYS: which of them is checked at the start
        return found

    def direct_keys(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Return digest -> name of the keys that the engine asks for; empty where Modal's proxy authenticates.

        Raises:
            UsageError: The secret has no key, or a wrong one.
        """
        if self.settings.direct_auth != "keys":
            return {}
        if keys := digests(environ):
            return keys
        secret = self.settings.keys_secret
        raise UsageError(
            f"Modal's secret '{secret}' has neither API_KEY nor API_KEYS.",
            hint=f"Add a key: modal secret create --force {secret} API_KEY=<key>.",
        )

    def class_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `@app.cls` that are plain values; what is unset keeps Modal's default."""
        s = self.settings
        options: dict[str, Any] = {
            "gpu": self.tier.request,
            "scaledown_window": s.scaledown_window,
            "min_containers": s.min_containers,
            "max_containers": s.most_replicas(),
            "buffer_containers": s.buffer_containers,
            "startup_timeout": s.startup_timeout_s + STARTUP_MARGIN_S,
            "timeout": s.request_timeout_s,
            "region": s.region,
            "enable_memory_snapshot": s.snapshot != "off",
            "experimental_options": {"enable_gpu_snapshot": True} if s.snapshot == "gpu" else None,
        }
        return {name: value for name, value in options.items() if value}


def default_model(settings: Settings, registry: Registry) -> ModelChoice:
    """Return what `SERVICE_MODEL` names.

    Raises:
        UnknownModelError: No entry has that name.
    """
    try:
        return registry.resolve(settings.model, Settings.model_fields["model"].default)
    except UnknownModelError as error:
        raise UnknownModelError(f"SERVICE_MODEL: {error.message}", hint=error.hint) from error


def hub_secret(specs: Iterable[ModelSpec], named: str | None) -> str | None:
    """Return the name of the secret with HF_TOKEN, where one of the models is gated or the user has named a secret."""
    return named or (DEFAULT_HUB_SECRET if any(spec.gated for spec in specs) else None)


def missing_hub_secret(secret: str, why: str) -> ServiceError:
    """Return the error of a gated model whose secret is missing; `why` is Modal's reason."""
    return ServiceError(
        f"A gated model needs Modal's secret '{secret}', which is missing or has no HF_TOKEN: {why}.",
        hint=f"Create it: modal secret create {secret} HF_TOKEN=<token>. SERVICE_HUB_SECRET names another.",
    )


def _check_snapshot(snapshot: str, n_gpu: int) -> None:
    if snapshot == "gpu" and n_gpu > 1:
        raise SettingsError(
            f"SERVICE_SNAPSHOT=gpu works on one GPU, and this model is to run on {n_gpu}: Modal snapshots no more.",
            hint="Set SERVICE_SNAPSHOT=cpu, or choose a GPU that holds the model alone.",
        )
