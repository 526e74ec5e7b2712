"""Reads Modal's current prices: for a command of this machine, and for the gateway, which tells and bounds costs.

They are a workspace's own. Whether a container may read them is up to Modal, so each deploy leaves those that it read
for the gateway.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import cache

import modal

from service.interrupts import not_lost
from service.modal_app import spend_store
from service.registry.prices import Prices
from service.registry.tiers import Tier

_TIMEOUT_S = 3.0
_REFRESH_S = 3600.0
_log = logging.getLogger(__name__)


@cache
def current() -> Prices:
    """Return the prices for this command; asked once. Blocks for 3 s at most."""
    with not_lost():
        return asyncio.run(_read()) or Prices()


def leave_for_gateway(app: str) -> None:
    """Keep the prices of this command where the gateway of that app finds them; none, where Modal told none.

    Raises:
        ServiceError: Modal refused.
    """
    if per_hour := current().per_hour:
        spend_store.save_prices(app, dict(per_hour))


class GatewayPrices:
    """The prices that the gateway tells and counts by: Modal's, read hourly, else the last deploy's, else the table's.

    Args:
        app: Name of the gateway's app.
        region: In which its tiers are.
        clock: Seconds.
    """

    def __init__(self, app: str, region: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._region, self._clock = app, region, clock
        self._prices, self._next = Prices(), clock()

    def of(self, tier: Tier) -> float:
        """Return what a replica of a tier costs in an hour."""
        return self._prices.of(tier, self._region)

    async def refresh(self) -> None:
        """Read them again where they are older than an hour; what nobody tells stays as it is."""
        if self._clock() < self._next:
            return
        self._next = self._clock() + _REFRESH_S
        self._prices = await _read() or await self._left() or self._prices
        _log.info("GPUs are counted by %s", self._prices.source)

    async def watch(self) -> None:
        """Read them once an hour for as long as the gateway runs."""
        while True:
            await self.refresh()
            await asyncio.sleep(_REFRESH_S)

    async def _left(self) -> Prices | None:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                per_hour = await spend_store.load_prices(self._app)
        except (modal.exception.Error, OSError, TimeoutError):
            return None
        return Prices(per_hour) if per_hour else None


async def _read() -> Prices | None:
    """Return Modal's prices by the hour; None: it does not tell them."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            rates = await modal.Workspace.from_context().billing.rates.aio()
    except (modal.exception.Error, OSError, TimeoutError):
        return None
    return Prices({name: float(value) for name, value in rates.items() if "_hour_cost" in name})
