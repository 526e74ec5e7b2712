"""What is deployed: apps with their URLs, replicas and price; stopping and scaling them."""

from __future__ import annotations

import time
from dataclasses import dataclass

from service.errors import ServiceError, UsageError
from service.gateway.tiers import tier_for
from service.modal_app import account, prices
from service.modal_app.deployment import Deployment
from service.modal_app.gateway_deployment import GatewayDeployment
from service.registry.models import ModelSpec
from service.registry.tiers import Tier, check_fit, parse_tier, tier_of, tier_of_app
from service.settings import Settings
from service.weights import revisions

_END_S = 30.0  # for idle replicas to end
_POLL_S = 0.5
_SHORTEST_WINDOW_S = 2


@dataclass(frozen=True)
class DeployedApp:
    """A deployed app of this service; the gateway has no tier."""

    app: account.App
    tier: Tier | None
    url: str | None
    region: str | None = None

    @property
    def dollars_per_hour(self) -> float:
        """What its replicas cost now."""
        return self.app.replicas * prices.current().of(self.tier, self.region) if self.app.replicas else 0.0


@dataclass(frozen=True)
class Target:
    """A model on a tier, or a tier: what a word names.

    Attributes:
        app: Name of the tier's app; an app of the model alone goes before it where one is deployed.
        model: None: the whole tier.
    """

    app: str
    tier: Tier
    model: ModelSpec | None = None

    def check_fit(self) -> None:
        """Refuse a tier that the model cannot run on, before a replica starts there.

        Raises:
            GpuFitError: The error names tiers that it can.
        """
        if self.model:
            check_fit(self.model, self.tier, lambda other: f"--gpu {other.request}")


class Names:
    """The apps that settings and registry lead to."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.registry = settings, revisions.registry(settings.models_file)
        self.gateway = GatewayDeployment(settings, self.registry).app_name

    def tier_of(self, app: str) -> Tier | None:
        """Return the tier of an app, None where it is none of this service's tiers."""
        if app == self.settings.app:
            return Deployment.resolve(self.settings.to_env()).tier
        if tier := tier_of_app(app):
            return tier
        alone = (spec.key for spec in self.registry.specs.values() if app.startswith(f"vllm-{spec.key}-"))
        return next((tier for key in alone if (tier := tier_of_app(f"vllm-{app.removeprefix(f'vllm-{key}-')}"))), None)

    def target(self, model: str | None, gpu: str | None = None) -> Target:
        """Return what a model, a GPU or both mean.

        Raises:
            UsageError: There is no such model or GPU.
        """
        kind, count = parse_tier(gpu) if gpu else (None, None)
        if model is None:
            if kind is None:
                raise UsageError("Neither a model nor --gpu was given.", hint="Give one of them.")
            tier = Tier(kind, count or 1)
            return Target(self.settings.app or tier.app_name, tier)
        choice = self.registry.resolve(model, self.settings.model)
        if chosen := kind or choice.gpu:
            tier = tier_of(choice.spec, chosen, count)
        else:
            tier = tier_for(self.settings, choice.spec, None)
        return Target(self.settings.app or tier.app_name, tier, choice.spec)


def is_gpu(name: str) -> bool:
    """Tell whether a word names a GPU rather than a model."""
    try:
        parse_tier(name)
    except UsageError:
        return False
    return True


def apps(names: Names) -> list[DeployedApp]:
    """Return the apps of this service that are deployed, the gateway first.

    Raises:
        ServiceError: There is no account, or Modal does not answer.
    """
    account.check_environment()
    ours = [app for app in account.deployed_apps().values() if app.name == names.gateway or names.tier_of(app.name)]
    layouts = account.layouts(ours)
    region = names.settings.region
    found = [
        DeployedApp(app, names.tier_of(app.name), layouts[app.name].url, region) for app in ours if app.name in layouts
    ]
    return sorted(found, key=lambda one: (one.tier is not None, one.app.name))


def find(names: Names, target: Target | None) -> DeployedApp:
    """Return what a model or a tier is served by: an app of the model alone goes before its tier's; None: the gateway.

    Raises:
        ServiceError: It is not deployed.
    """
    found = {one.app.name: one for one in apps(names)}
    app = target.app if target else names.gateway
    if target and target.model and (alone := target.tier.model_app_name(target.model.key)) in found:
        app = alone
    if app not in found:
        deployed = f"Deployed: {', '.join(found)}." if found else "Nothing of this service is deployed."
        raise ServiceError(
            f"App '{app}' is not deployed. {deployed}", hint="Deploy it: vllm-service deploy (--help has the options)."
        )
    return found[app]


def scale(names: Names, target: Target, **settings: int | None) -> dict[str, int | None]:
    """Set the least, most and buffered replicas of a model's pool; return all that its autoscaler then has.

    Raises:
        ServiceError: The tier is not deployed, the model cannot run on it, or Modal refused.
    """
    if settings.get("min_containers"):
        target.check_fit()
    app = find(names, target).app.name
    now = account.set_autoscaler(app, _key(target), **settings)
    return {name: getattr(now, name) for name in ("min_containers", "max_containers", "buffer_containers")}


def end_replicas(app: DeployedApp, target: Target, idle_timeout_s: int) -> tuple[int, int]:
    """Keep no replica of a model up, and end those that are idle; return how many there were, and how many are left.

    Those with requests end after them. The idle timeout is short meanwhile, and then as it was.

    Args:
        app: What serves the model.
        target: The model.
        idle_timeout_s: What Modal does not tell where it was never set for this pool.

    Raises:
        ServiceError: Modal refused.
    """
    name, key = app.app.name, _key(target)
    window = account.autoscaler(name, key).scaledown_window or idle_timeout_s
    before = left = account.replicas(name, key)
    try:
        account.set_autoscaler(name, key, min_containers=0, buffer_containers=0, scaledown_window=_SHORTEST_WINDOW_S)
        deadline = time.monotonic() + _END_S
        while (left := account.replicas(name, key)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    finally:
        account.set_autoscaler(name, key, scaledown_window=window)
    return before, left


def _key(target: Target) -> str:
    if target.model is None:
        raise UsageError("A pool is that of a model, and none was given.", hint="Name a model.")
    return target.model.key
