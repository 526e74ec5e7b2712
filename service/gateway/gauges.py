"""Gauges of `/metrics`, read when it is: what pools do, how much of their limits keys have used, what a day has cost.

They have rows for pools and keys in use, and none for those that are only configured. Reading them wakes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.gateway.clients import ClientRegistry
from service.gateway.held import HeldRequests
from service.gateway.pool import Pool
from service.gateway.pool_status import PoolStatus
from service.gateway.router import ModelRouter
from service.gateway.spending import SpendGuard

_STATES = ("cold", "waking", "ready", "failed", "not_deployed")


class PoolGauges(Collector):
    """The pools that are up, or that were used since the gateway began.

    Args:
        router: Has the pools.
        status: Knows their states.
        held: All held requests.
    """

    def __init__(self, router: ModelRouter, status: PoolStatus, held: HeldRequests) -> None:
        self._router, self._status, self._held = router, status, held
        self._states: dict[Pool, str] = {}

    @property
    def models(self) -> Collection[str]:
        """Keys of all models."""
        return self._router.registry.specs.keys()

    @property
    def used_models(self) -> Collection[str]:
        """Keys of the models whose pools have rows."""
        return {pool.spec.key for pool in self._states}

    async def refresh(self) -> None:
        """Find out the states of the pools, which `collect` then returns."""
        pools = [pool for pool in self._router.known_pools() if pool in self._states or _is_used(pool)]
        self._states = {
            pool: "failed" if state == "cold" and pool.failure else state
            for pool, state in zip(pools, await self._status.states(pools), strict=True)
        }

    def collect(self) -> Iterator[Metric]:
        """Return them as they were at the last refresh, and the numbers as they are now."""
        labels = ["model", "gpu"]
        state = GaugeMetricFamily("gateway_pool_state", "1 for the state of a pool", labels=[*labels, "state"])
        held = GaugeMetricFamily("gateway_pool_requests_held", "Requests that wait for a pool to wake", labels=labels)
        answering = GaugeMetricFamily("gateway_pool_requests_answering", "Requests that a pool answers", labels=labels)
        waking = GaugeMetricFamily("gateway_pool_waking_seconds", "How long a wake has taken so far", labels=labels)
        usual = GaugeMetricFamily(
            "gateway_pool_usual_wake_seconds", "How long a wake takes, by the last one or recorded boots", labels=labels
        )
        price = GaugeMetricFamily(
            "gateway_pool_dollars_per_hour", "Price of one replica; 0 on this machine", labels=labels
        )
        for pool, current in self._states.items():
            names = [pool.spec.key, pool.location]
            for one in _STATES:
                state.add_metric([*names, one], float(one == current))
            held.add_metric(names, self._held.count(pool))
            answering.add_metric(names, pool.answering)
            waking.add_metric(names, pool.waking_s)
            price.add_metric(names, pool.current_price or 0.0)
            if pool.usual_s is not None:
                usual.add_metric(names, pool.usual_s)
        yield from (state, held, answering, waking, usual, price)


class KeyGauges(Collector):
    """The limits of the keys that have used some of one.

    Args:
        clients: Have them.
    """

    def __init__(self, clients: ClientRegistry) -> None:
        self._clients = clients

    def collect(self) -> Iterator[Metric]:
        """Return them as they are now."""
        labels = ["key", "limit"]
        limit = GaugeMetricFamily("gateway_key_limit", "Limits of keys", labels=labels)
        used = GaugeMetricFamily("gateway_key_limit_used", "How much of its limit a key has used", labels=labels)
        for client in self._clients:
            uses = client.limit_use()
            if any(amount for _, amount in uses.values()):
                for name, (most, amount) in uses.items():
                    limit.add_metric([client.name, name], most)
                    used.add_metric([client.name, name], amount)
        yield from (limit, used)


class SpendGauges(Collector):
    """What the day has cost, where a limit bounds that.

    Args:
        guard: Counts it.
    """

    def __init__(self, guard: SpendGuard) -> None:
        self._guard = guard

    def collect(self) -> Iterator[Metric]:
        """Return it as it was counted last."""
        if spent := self._guard.spent:
            dollars, limit = spent
            yield GaugeMetricFamily("gateway_day_dollars", "What the replicas have cost today, in UTC", dollars)
            yield GaugeMetricFamily("gateway_day_limit_dollars", "What they may cost", limit)


def _is_used(pool: Pool) -> bool:
    return pool.state != "cold" or bool(pool.in_use or pool.failure or pool.usual_s or pool.answered_at is not None)
