"""Plans a deploy from settings and registry alone: which apps it publishes, and what each is published from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from service import otel
from service.engine import flags
from service.errors import GpuFitError, UsageError
from service.files import expand_user
from service.gateway.tiers import tier_for
from service.image import check_sources
from service.modal_app.deployment import Deployment, default_model, hub_secret
from service.modal_app.digests import Digest
from service.modal_app.gateway_deployment import GatewayDeployment
from service.registry.gpus import GPUS
from service.registry.models import ModelSpec, Registry
from service.registry.tiers import Tier, check_fit, parse_tier, tier_of
from service.settings import Settings
from service.weights import revisions

ALL_GPUS = ("L40S", "A100-80GB", "H100", "H200", "B200")
WhyMissing = Callable[[str], str | None]


@dataclass(frozen=True)
class DeployRequest:
    """What the command line asks for.

    Attributes:
        names: Models; the first is the service's default, unless SERVICE_MODEL is set. None: the default model.
        gpu: A tier for all of them, as `H200` or `H200:2`.
        all_gpus: The tiers of `ALL_GPUS`, one GPU each.
        per_model: An app for each model alone, in place of its tier's.
    """

    names: tuple[str, ...] = ()
    gpu: str | None = None
    all_gpus: bool = False
    per_model: bool = False


@dataclass(frozen=True)
class PlannedApp:
    """An app to publish.

    Attributes:
        module: What `modal deploy -m` is given.
        settings: The settings that its deploy reads.
        tier: Its GPUs; None: it is the gateway.
        models: The models that it was planned for, its default first.
        entries: Those, and the others whose names without a GPU lead to it.
    """

    name: str
    module: str
    settings: Settings
    digest: Digest
    tier: Tier | None = None
    models: tuple[ModelSpec, ...] = ()
    entries: tuple[ModelSpec, ...] = ()


@dataclass(frozen=True)
class DeployPlan:
    """The apps of a deploy, the gateway last, and the settings that the gateway reads."""

    settings: Settings
    apps: tuple[PlannedApp, ...]
    notes: tuple[str, ...] = ()

    @property
    def models(self) -> tuple[ModelSpec, ...]:
        """The models that it was planned for, each once."""
        return tuple({spec.key: spec for app in self.apps for spec in app.models}.values())


def make_plan(request: DeployRequest, settings: Settings, why_hub_secret_missing: WhyMissing) -> DeployPlan:
    """Return the plan; the registry is read anew.

    Args:
        request: What to deploy.
        settings: Of this command.
        why_hub_secret_missing: Returns why there is no secret of this name with HF_TOKEN; None: there is one.

    Raises:
        UsageError: A name, a GPU, an entry or a setting is wrong, or a model does not fit on its tier.
        ServiceError: A gated model's secret is missing.
    """
    if request.gpu and request.all_gpus:
        raise UsageError("--gpu and --all-gpus were both given.", hint="Give one of them.")
    if request.per_model and settings.app:
        raise UsageError(f"--per-model names apps itself, and SERVICE_APP='{settings.app}' is set.", hint="Unset it.")
    settings = _for_all(request, settings)
    registry = revisions.registry(settings.models_file)
    names = request.names or (settings.model,)
    tiers, notes = _tiers(request, names, settings, registry)
    if settings.app and len(tiers) > 1:
        labels = ", ".join(tier.label for tier in tiers)
        raise UsageError(
            f"SERVICE_APP='{settings.app}' names one app, and these models need {len(tiers)} tiers: {labels}.",
            hint="Unset SERVICE_APP, or deploy one tier at a time.",
        )
    default = default_model(settings, registry).spec
    apps = []
    for tier, models in tiers.items():
        if request.per_model:
            apps += [_model_app(tier, spec, settings, why_hub_secret_missing) for spec in models]
        else:
            apps.append(_tier_app(tier, _default_first(models, default), settings, registry, why_hub_secret_missing))
    gateway = GatewayDeployment(settings, registry)
    digest = Digest.of_gateway(settings, list(registry.specs.values()), registry.aliases)
    apps.append(PlannedApp(gateway.app_name, "service.gateway_app", settings, digest))
    if reason := otel.why_off(os.environ):
        notes.append(f"No traces are exported: {reason}")
    return DeployPlan(settings, tuple(apps), tuple(notes))


def _for_all(request: DeployRequest, settings: Settings) -> Settings:
    """Return the settings with what the command line says of the whole service."""
    update: dict[str, object] = {}
    if settings.models_file:  # the deploys run in another directory
        update["models_file"] = str(expand_user(settings.models_file).absolute())
    if request.names and "model" not in settings.model_fields_set:
        update["model"] = request.names[0]
    if request.gpu:
        gpu, count = parse_tier(request.gpu)
        update |= {"gpu": gpu.name, "n_gpu": count}
    return settings.model_copy(update=update)


def _tiers(
    request: DeployRequest, names: Sequence[str], settings: Settings, registry: Registry
) -> tuple[dict[Tier, list[ModelSpec]], list[str]]:
    """Return the models of each tier, and sentences about what is left out."""
    found: dict[Tier, list[ModelSpec]] = {}
    left_out: list[str] = []
    for name in names:
        choice = registry.resolve(name, Settings.model_fields["model"].default)
        flags.check(choice.spec)
        check_sources(choice.spec)
        if request.all_gpus:
            tiers = [Tier(GPUS[gpu]) for gpu in ALL_GPUS]
        else:
            tiers = [tier_of(choice.spec, choice.gpu) if choice.gpu else tier_for(settings, choice.spec, None)]
        for tier in tiers:
            try:
                check_fit(choice.spec, tier, lambda other: f"--gpu {other.request}")
            except GpuFitError as error:
                if not request.all_gpus:
                    raise
                left_out.append(f"Left out: {error.message}")
            else:
                models = found.setdefault(tier, [])
                models += [choice.spec] if choice.spec not in models else []
    if not found:
        raise GpuFitError(f"None of the tiers holds {', '.join(names)}.", hint="Leave --all-gpus out.")
    return found, left_out


def _default_first(models: list[ModelSpec], default: ModelSpec) -> tuple[ModelSpec, ...]:
    return tuple(sorted(models, key=lambda spec: spec.key != default.key))


def _tier_app(
    tier: Tier, models: tuple[ModelSpec, ...], settings: Settings, registry: Registry, why_missing: WhyMissing
) -> PlannedApp:
    entries = {spec.key: spec for spec in (*models, *_led_to(tier, settings, registry))}
    own = _settings_of(tier, models, settings)
    deployment = Deployment.resolve(own.to_env()).with_hub_secret(why_missing)
    digest = Digest.of_tier(deployment.settings, list(entries.values()), list(registry.specs.values()))
    return PlannedApp(deployment.app_name, "service.server", own, digest, tier, models, tuple(entries.values()))


def _model_app(tier: Tier, spec: ModelSpec, settings: Settings, why_missing: WhyMissing) -> PlannedApp:
    """Return the app of a model alone, which only a change of its own entry concerns."""
    own = _settings_of(tier, (spec,), settings).model_copy(update={"app": tier.model_app_name(spec.key)})
    deployment = Deployment.resolve(own.to_env()).with_hub_secret(why_missing)
    digest = Digest.of_tier(deployment.settings, [spec], [spec])
    return PlannedApp(deployment.app_name, "service.server", own, digest, tier, (spec,), (spec,))


def _settings_of(tier: Tier, models: tuple[ModelSpec, ...], settings: Settings) -> Settings:
    return settings.model_copy(
        update={
            "model": models[0].key,
            "gpu": tier.gpu.name,
            "n_gpu": tier.n_gpu,
            "hub_secret": hub_secret(models, settings.hub_secret),
        }
    )


def _led_to(tier: Tier, settings: Settings, registry: Registry) -> Iterator[ModelSpec]:
    """Yield the entries whose names without a GPU lead to a tier."""
    return (spec for spec in registry.specs.values() if tier_for(settings, spec, None) == tier)
