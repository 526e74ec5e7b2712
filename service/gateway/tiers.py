"""The pools of all deployed tiers: one for each model and tier that the registry and the names in requests refer to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from service.errors import UnknownGpuError
from service.gateway.boot_volume import BootVolume
from service.gateway.call_rate import CallRate
from service.gateway.deployed_tier import DeployedTier
from service.gateway.modal_pool import ON, ModalPool
from service.gateway.pool import OnWake, ignore_wake
from service.gateway.spending import SpendGuard
from service.registry.gpus import Gpu, find_gpu
from service.registry.models import ModelSpec
from service.registry.tiers import Tier, tier_of, tier_of_label
from service.settings import Settings

_OWN_LOOKUP_INTERVAL_S = 60.0  # of an app for one model, which few services have


class Tiers:
    """The pools of all tiers that the registry and the names in requests refer to.

    Args:
        settings: The gateway's: default GPU, app, timeouts.
        headers: The proxy token for Modal's proxy; empty: the clients' own keys are passed on.
        on_wake: Called after each wake of a pool.
        volume: Has the boots that cannot work; None: nobody records them.
        guard: Bounds what the pools cost; None: nothing does.
        price: Returns what a replica costs in an hour now; None: that of the table.
    """

    def __init__(
        self,
        settings: Settings,
        headers: Mapping[str, str],
        on_wake: OnWake = ignore_wake,
        volume: BootVolume | None = None,
        guard: SpendGuard | None = None,
        *,
        price: Callable[[Tier], float] | None = None,
    ) -> None:
        self._settings, self._headers, self._on_wake, self._guard = settings, headers, on_wake, guard
        self._volume, self._calls, self._price = volume, CallRate(), price
        self._tiers: dict[Tier, DeployedTier] = {}
        self._pools: dict[tuple[str, Tier], ModalPool] = {}

    def pool(self, spec: ModelSpec, gpu: Gpu | None) -> ModalPool:
        """Return the pool of a model on a GPU; None: the one that the deploy of its tier would take."""
        return self.pool_on(spec, tier_for(self._settings, spec, gpu))

    def pool_on(self, spec: ModelSpec, tier: Tier) -> ModalPool:
        """Return the pool of a model on a tier."""
        settings = self._settings
        app = self._tiers.setdefault(tier, DeployedTier(tier, settings.app or tier.app_name, calls=self._calls))
        if (pool := self._pools.get((spec.key, tier))) is None:
            pool = ModalPool(
                spec,
                app,
                None if settings.app else self._own_app(spec, tier),
                self._headers,
                command=self._deploy_command(spec, tier),
                fresh_s=settings.scaledown_window / 2,
                capacity=settings.most_replicas(spec.max_containers) * settings.max_inputs,
                timeout_s=float(settings.startup_timeout_s),
                answer_s=float(settings.request_timeout_s),
                on_wake=self._on_wake,
                volume=self._volume,
                guard=self._guard,
                price=self._price,
            )
            self._pools[spec.key, tier] = pool
        return pool

    def all(self, specs: Mapping[str, ModelSpec], names: Iterable[str] = ()) -> list[ModalPool]:
        """Return the pools of models on their own tiers, those that were asked for on others, and those of names."""
        for spec in specs.values():
            self.pool(spec, None)
        for name in names:
            key, _, label = name.partition(ON)
            with suppress(UnknownGpuError):  # it is from another version
                if spec := specs.get(key):  # type: ignore[assignment]
                    self.pool_on(spec, tier_of_label(label))
        return list(self._pools.values())

    def _own_app(self, spec: ModelSpec, tier: Tier) -> DeployedTier:
        return DeployedTier(tier, tier.model_app_name(spec.key), _OWN_LOOKUP_INTERVAL_S, calls=self._calls)

    def _deploy_command(self, spec: ModelSpec, tier: Tier) -> str:
        """Return the command that deploys the tier of a model and leaves the gateway's default and GPU as they are."""
        settings = self._settings
        own = tier == tier_for(settings, spec, None)
        is_default = own and settings.model.lower() in {spec.key, (spec.hub_id or "").lower()}
        names = ([] if is_default else [settings.model]) + [spec.key if own else f"{spec.key}-{tier.gpu.slug}"]
        gpu = f" --gpu {settings.gpu}{f':{settings.n_gpu}' if settings.n_gpu else ''}" if settings.gpu else ""
        return f"vllm-service deploy {' '.join(names)}{gpu}"


def tier_for(settings: Settings, spec: ModelSpec, gpu: Gpu | None) -> Tier:
    """Return the tier of a model: that of the GPU in its name, else that of the settings, else its entry's own."""
    if gpu:
        return tier_of(spec, gpu)
    chosen = find_gpu(settings.gpu) if settings.gpu else spec.tier.gpu
    # SERVICE_N_GPU is meant for the default tier: Modal may not attach as many of another GPU to one container
    return tier_of(spec, chosen, settings.n_gpu and min(settings.n_gpu, chosen.max_count))
