"""The pools of the deployed tiers under the limits of spending, and what those need of Modal."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any

from service.errors import ServiceError
from service.gateway.boot_volume import BootVolume
from service.gateway.modal_pool import ON
from service.gateway.pool import OnWake, ignore_wake
from service.gateway.spending import SpendGuard
from service.gateway.tiers import Tiers
from service.gateway.webhook import Notify, ignore_event
from service.modal_app import account
from service.modal_app.deployed import Names
from service.modal_app.gateway_deployment import GatewayDeployment
from service.modal_app.prices import GatewayPrices
from service.modal_app.spend_store import DictStore
from service.modal_app.warm import Schedules
from service.modal_app.warm_schedule import Schedule

_READ_TIMEOUT_S = 5.0
_log = logging.getLogger(__name__)


def limited_tiers(
    gateway: GatewayDeployment,
    headers: Mapping[str, str],
    on_wake: OnWake = ignore_wake,
    volume: BootVolume | None = None,
    notify: Notify = ignore_event,
) -> tuple[Tiers, SpendGuard | None, Callable[[], Coroutine[Any, Any, None]]]:
    """Return the pools, what bounds their spending (None: nothing is limited and nobody is told), and what runs beside.

    What runs beside the gateway keeps the prices current, and counts a day's dollars where they are limited. Where they
    are not any more, it gives pools back what the limit has lowered.

    Args:
        gateway: Whose limits hold.
        headers: See `Tiers`.
        on_wake: Likewise.
        volume: Likewise.
        notify: Told of the first wake of a day and of the stop.
    """
    settings, app = gateway.settings, gateway.app_name
    prices = GatewayPrices(app, settings.region)
    guard = SpendGuard(
        DictStore(app),
        max_gpus=settings.max_gpus,
        max_dollars_per_day=settings.max_dollars_per_day,
        idle_timeout_s=settings.scaledown_window,
        notify=notify,
        refresh=prices.refresh,
        kept_warm=_KeptWarm(gateway),
        gpus_up=partial(_gpus_up, Names(settings)),
    )
    asked = guard if settings.max_gpus or settings.max_dollars_per_day or notify is not ignore_event else None
    tiers = Tiers(settings, headers, on_wake, volume, asked, price=prices.of)
    guard.pools = lambda names: tiers.all(gateway.registry.specs, names)

    async def watch() -> None:
        await guard.run()
        await prices.watch()

    return tiers, asked, watch


def why_not(gateway: GatewayDeployment, schedule: Schedule) -> str | None:
    """Return why the limits forbid to keep the pool of a schedule up now; None: they do not. Blocks.

    Raises:
        ServiceError: Modal refused.
    """

    async def ask() -> str | None:
        tiers, guard, _ = limited_tiers(gateway, {})
        spec, tier = gateway.registry.specs.get(schedule.model), Names(gateway.settings).tier_of(schedule.app)
        return await guard.why_not(tiers.pool_on(spec, tier)) if guard and spec and tier else None

    with account.translate_errors("read what the limits of spending need"):
        return asyncio.run(ask())


async def _gpus_up(names: Names) -> int:
    """Return the GPUs of the running containers of all tiers, as Modal lists the apps; none where it does not."""
    try:
        async with asyncio.timeout(_READ_TIMEOUT_S):
            apps = await asyncio.to_thread(account.deployed_apps)
    except (ServiceError, TimeoutError) as error:
        _log.warning("The apps were not listed: %s", type(error).__name__)
        return 0
    return sum(app.replicas * tier.n_gpu for app in apps.values() if (tier := names.tier_of(app.name)))


class _KeptWarm:
    """The names of the pools that have a schedule, and whether it has raised them.

    Where Modal does not answer, as they were known last.
    """

    def __init__(self, gateway: GatewayDeployment) -> None:
        self._schedules, self._names = Schedules(gateway.settings.volume_prefix), Names(gateway.settings)
        self._known: dict[str, bool] = {}

    async def __call__(self) -> Mapping[str, bool]:
        try:
            async with asyncio.timeout(_READ_TIMEOUT_S):
                found = await asyncio.to_thread(self._schedules.all)
        except (ServiceError, TimeoutError) as error:
            _log.warning("The schedules of warm models were not read: %s", type(error).__name__)
        else:
            self._known = {}
            for one in found:
                if tier := self._names.tier_of(one.app):
                    name = f"{one.model}{ON}{tier.label}"
                    self._known[name] = one.raised or self._known.get(name, False)
        return self._known
