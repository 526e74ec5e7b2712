"""Deploys the service: compares the plan with the account, makes what is missing, publishes what has changed.

Each step can be interrupted: what is done stays, and the same command goes on from there. Weights are fetched before
anything that serves them is published, so a model that cannot be fetched leaves everything as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, Protocol

from service.boots.failures import BootFailure
from service.errors import ServiceError
from service.modal_app import account, failures, prerequisites, prices, upload
from service.modal_app.client import why_hub_secret_missing
from service.modal_app.deploy_plan import DeployPlan, DeployRequest, PlannedApp, make_plan
from service.modal_app.digests import Digest, new_run
from service.modal_app.leases import shared_lease
from service.modal_app.prerequisites import Missing
from service.modal_app.publish import publish
from service.registry.models import ModelSpec
from service.settings import Settings

FREE_ENDPOINTS = 8  # web endpoints that Modal's free plan allows
FOREIGN = "deployed by another command"
_LEASE_EXPIRY_S = 20.0  # a command that was killed releases nothing, and the next one waits for so long
Action = Literal["create", "update", "keep"]


@dataclass(frozen=True)
class Step:
    """What a deploy does with an app.

    Attributes:
        deployed: The app as it is now; None: there is none.
        changes: What differs: parts of the digest.
        before: The digest of the deployed version; None: another command made it.
    """

    app: PlannedApp
    deployed: account.App | None = None
    changes: tuple[str, ...] = ()
    before: Digest | None = None

    @property
    def action(self) -> Action:
        """What is done."""
        if self.deployed is None:
            return "create"
        return "update" if self.changes else "keep"

    @property
    def dollars_per_hour(self) -> float:
        """What one replica costs now."""
        return prices.current().of(self.app.tier, self.app.settings.region)

    @property
    def costs_snapshots(self) -> bool:
        """Whether the memory snapshots of its models have to be made anew: Modal drops them with each new version."""
        return self.action == "update" and bool(self.app.tier) and self.app.settings.snapshot != "off"


@dataclass(frozen=True)
class Prepared:
    """A deploy that could begin: every prerequisite was checked, nothing was changed."""

    request: DeployRequest
    workspace: str
    plan: DeployPlan
    steps: tuple[Step, ...]
    missing: Missing
    notes: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing to do."""
        return not self.missing.names and all(step.action == "keep" for step in self.steps)

    @property
    def dollars_per_hour_up(self) -> float:
        """What one replica of each tier costs while all are up."""
        return sum(step.dollars_per_hour for step in self.steps)

    @property
    def dollars_per_hour_idle(self) -> float:
        """What the replicas cost that are always up."""
        return sum(
            step.dollars_per_hour * step.app.settings.min_containers * len(step.app.models) for step in self.steps
        )


class Reporter(Protocol):
    """Shows how far a deploy is."""

    def say(self, text: str) -> None:
        """Show a sentence that stays."""

    def doing(self, text: str) -> AbstractContextManager[Callable[[str], None]]:
        """Show what is being waited for while the block lasts; the block may add the latest line to it."""

    def prefetch(self, specs: tuple[ModelSpec, ...], settings: Settings) -> None:
        """Fetch weights into Modal's volume, and show the progress."""


@dataclass
class Made:
    """What a deploy made, as far as it came: the admin key is in it even when the deploy is interrupted."""

    key: str | None = None
    secrets: list[str] = field(default_factory=list)
    published: list[str] = field(default_factory=list)


def check(request: DeployRequest, settings: Settings) -> None:
    """Refuse what is wrong with names, entries, GPUs and settings, before Modal is asked.

    Raises:
        UsageError: Something is.
    """
    make_plan(request, settings, lambda _: None)


def prepare(request: DeployRequest, settings: Settings) -> Prepared:
    """Compare the plan with the account.

    Raises:
        ServiceError: A prerequisite is missing.
    """
    workspace = account.connect()
    plan = make_plan(request, settings, cache(why_hub_secret_missing))
    upload.check(plan.models, settings.volume_prefix)
    apps = account.deployed_apps()
    layouts = account.layouts(apps.values())
    steps = tuple(_step(app, apps.get(app.name)) for app in plan.apps)
    notes = [*plan.notes, *_stale(steps)]
    others = sum(layout.endpoints for layout in layouts.values())
    if (endpoints := others + sum(step.action == "create" for step in steps)) > FREE_ENDPOINTS:
        notes.append(
            f"Modal's free plan allows {FREE_ENDPOINTS} web endpoints, and this environment will have {endpoints}: "
            "a deploy beyond the limit is refused. 'vllm-service stop --gpu G' frees one."
        )
    return Prepared(request, workspace, plan, steps, prerequisites.missing(plan.settings), tuple(notes))


def _step(app: PlannedApp, deployed: account.App | None) -> Step:
    if deployed is None:
        return Step(app)
    before = Digest.parse(account.version(deployed).tag)
    return Step(app, deployed, app.digest.changes_since(before) if before else (FOREIGN,), before)


def _stale(steps: tuple[Step, ...]) -> Iterator[str]:
    """Yield sentences about tiers that are kept although entries of other tiers have changed."""
    for step in steps:
        is_stale = step.before and step.before.registry != step.app.digest.registry
        if is_stale and step.app.tier and step.action == "keep":
            yield (
                f"'{step.app.name}' is kept, with its snapshots: only entries of other tiers have changed. Under names "
                f"such as <model>-{step.app.tier.gpu.slug} it serves them as they were; name such a model to change it."
            )


def deploy(prepared: Prepared, settings: Settings, reporter: Reporter, made: Made) -> Prepared:
    """Do what was prepared, one deploy of the environment at a time, and return it as it was done.

    Raises:
        ServiceError: A step failed; what was done before it stays.
        KeyboardInterrupt: It was interrupted; likewise.
    """
    lease = shared_lease(settings.volume_prefix, _LEASE_EXPIRY_S)
    with account.translate_errors("deploy"), lease.held("the deploy"):
        prepared = prepare(prepared.request, settings)  # another deploy may have ended meanwhile
        waiting = [step for step in prepared.steps if step.action != "keep"]
        models = {spec.key: spec for step in waiting for spec in step.app.models if spec.repositories}
        if models:
            reporter.prefetch(tuple(models.values()), prepared.plan.settings)
            # it may have resolved the revisions of entries that name none
            plan = make_plan(prepared.request, settings, cache(why_hub_secret_missing))
            planned = {app.name: app for app in plan.apps}
        else:
            planned = {step.app.name: step.app for step in waiting}
        _make_secrets(prepared, made)
        run = new_run()
        for step in waiting:
            app = planned[step.app.name]
            with reporter.doing(f"Publishing {app.name}") as on_line:
                publish(app, app.digest.of_run(run).tag(), on_line)
            made.published.append(app.name)
            failures.clear([app.name], settings.volume_prefix)
            _scale(app, reporter.say)
            reporter.say(f"{app.name} is published")
    return prepared


def retry(prepared: Prepared, settings: Settings) -> list[BootFailure]:
    """Let the next request boot what is known to fail, on each tier of the deploy; return what was known.

    Raises:
        ServiceError: Modal does not answer.
    """
    return failures.clear([step.app.name for step in prepared.steps if step.app.tier], settings.volume_prefix)


def _make_secrets(prepared: Prepared, made: Made) -> None:
    def on_key(key: str) -> None:
        made.key = key

    prerequisites.make(prepared.missing, on_key)
    made.secrets += prepared.missing.names


def _scale(app: PlannedApp, say: Callable[[str], None]) -> None:
    """Apply what Modal ignores of a class with parameters, and what an entry says of its own pool.

    Where it breaks off it says how to do the rest: the next deploy finds a version that has not changed.
    """
    left = [*_scalings(app)]
    try:
        while left:
            key, changes = left[0]
            account.set_autoscaler(app.name, key, **changes)
            del left[0]
    except BaseException:
        commands = "; ".join(_scale_command(app, *one) for one in left)
        say(f"{app.name} is published, but not scaled as its settings say. What is left: {commands}")
        raise


def _scalings(app: PlannedApp) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield what to set, by model."""
    least, buffer = app.settings.min_containers, app.settings.buffer_containers
    for spec in app.entries:
        most = app.settings.most_replicas(spec.max_containers)
        changes = {} if most == app.settings.most_replicas() else {"max_containers": most}
        if spec in app.models and (least or buffer):
            changes |= {"min_containers": least, "buffer_containers": buffer}
        if changes:
            yield spec.key, changes


def _scale_command(app: PlannedApp, key: str, changes: dict[str, int]) -> str:
    options = " ".join(f"--{name.removesuffix('_containers')} {number}" for name, number in changes.items())
    gpu = f" --gpu {app.tier.request}" if app.tier else ""
    return f"vllm-service scale {key}{gpu} {options}"


def roll_back(request: DeployRequest, settings: Settings, say: Callable[[str], None]) -> list[tuple[str, int, int]]:
    """Deploy the versions again that the newest deploy replaced; return app, number before and number now of each.

    The apps of the request are asked which deploy made them; those of the newest go back.

    Raises:
        ServiceError: There is nothing to go back to.
    """
    account.connect()
    plan = make_plan(request, settings, lambda _: None)
    deployed, apps = account.deployed_apps(), []
    for name in (app.name for app in plan.apps if app.name in deployed):
        version = account.version(deployed[name])
        if digest := Digest.parse(version.tag):
            apps.append((digest.run, deployed[name], version))
    newest = max((run for run, _, _ in apps), default=None)
    back = [(app, version) for run, app, version in apps if run == newest and version.before]
    if not back:
        names = ", ".join(app.name for app in plan.apps)
        raise ServiceError(
            f"There is no version to go back to: the newest deploy of {names} is the first, or there is none.",
            hint="'vllm-service list' shows what is deployed, 'vllm-service stop' stops it.",
        )
    done, planned = [], {app.name: app for app in plan.apps}
    for app, version in back:
        account.roll_back(app, int(version.before or 0))
        _scale(planned[app.name], say)
        done.append((app.name, version.number, int(version.before or 0)))
    return done


def gateway_url(prepared: Prepared) -> str:
    """Return the URL of the gateway.

    Raises:
        ServiceError: It is not deployed.
    """
    name = prepared.plan.apps[-1].name
    app = account.deployed_apps().get(name)
    layout = account.layouts([app]).get(name) if app else None
    if not layout or not layout.url:
        raise ServiceError(f"App '{name}' is not deployed.", hint="Deploy it: vllm-service deploy.")
    return layout.url.rstrip("/")
