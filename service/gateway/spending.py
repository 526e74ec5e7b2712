"""Bounds what the pools on Modal cost: GPUs that are up at once, and dollars a day.

The gateway counts replicas when it wakes a pool and, where there is a limit a day, every half minute. What the day has
cost is kept in a record outside of its container. Only GPUs count, at the prices of their pools.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

from service.gateway.spend_day import Day, Running, date_of, end_of
from service.gateway.webhook import Notify, ignore_event
from service.in_engine.vllm_service.api_error import APIError

INTERVAL_S = 30.0
_GPUS_RETRY_S = 30.0
_AT_ONCE = 8
_COUNT_TIMEOUT_S = 5.0
_HOUR_S = 3600.0
_log = logging.getLogger(__name__)


class SpendingPool(Protocol):
    """What the limits need of a pool.

    Attributes:
        name: Its model and GPUs; unique.
        n_gpu: GPUs of one replica.
        current_price: What one replica costs in an hour now.
        is_waking: Whether it is being woken.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - described above
    @property
    def n_gpu(self) -> int: ...  # noqa: D102
    @property
    def current_price(self) -> float: ...  # noqa: D102
    @property
    def is_waking(self) -> bool: ...  # noqa: D102

    async def count_replicas(self) -> int:
        """Return how many replicas it has; none where it is not deployed."""

    async def scale_to_zero(self) -> dict[str, int]:
        """Let its idle replicas end now, and return the autoscaler's settings until then."""

    async def restore(self, settings: dict[str, int]) -> None:
        """Give the autoscaler its settings back; do nothing where it is not deployed any more."""


class SpendStore(Protocol):
    """Keeps the record."""

    async def load(self) -> dict[str, Any] | None:
        """Return what was saved last."""

    async def save(self, record: dict[str, Any]) -> None:
        """Keep it."""


async def _nothing() -> None:
    """Leave all as it is."""


async def _no_schedules() -> Mapping[str, bool]:
    """Return none."""
    return {}


async def _no_gpus() -> int:
    """Return that none is up."""
    return 0


class SpendGuard:
    """The limits of one service.

    Args:
        store: Keeps what the day has cost.
        max_gpus: GPUs that may be up; None: any number.
        max_dollars_per_day: None: no limit.
        idle_timeout_s: After which an idle replica ends.
        notify: Told of the first wake of a day and of the stop.
        refresh: Has prices read again, where they are old.
        kept_warm: Returns the names of the pools that have a schedule, and whether it has raised the least number of
            their replicas.
        gpus_up: Returns the GPUs of all tiers' replicas, those too of pools that no gateway was asked for.
        clock: Seconds since 1970.

    Attributes:
        pools: Returns all pools that there may be; takes the names of those that were asked for by another gateway, or
            that a schedule keeps up.
    """

    def __init__(
        self,
        store: SpendStore,
        *,
        max_gpus: int | None = None,
        max_dollars_per_day: int | None = None,
        idle_timeout_s: float = 900.0,
        notify: Notify = ignore_event,
        refresh: Callable[[], Awaitable[None]] = _nothing,
        kept_warm: Callable[[], Awaitable[Mapping[str, bool]]] = _no_schedules,
        gpus_up: Callable[[], Awaitable[int]] = _no_gpus,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.pools: Callable[[Iterable[str]], Iterable[SpendingPool]] = lambda _: ()
        self._store, self._max_gpus, self._max_dollars = store, max_gpus, max_dollars_per_day
        self._idle_timeout_s, self._notify, self._clock = idle_timeout_s, notify, clock
        self._refresh, self._kept_warm, self._gpus_up = refresh, kept_warm, gpus_up
        self._raised: Mapping[str, bool] = {}
        self._day: Day | None = None
        self._changing = asyncio.Lock()

    async def run(self) -> None:
        """Count what the day costs, for as long as the gateway runs.

        Where there is no limit a day it ends once the pools have back what an earlier limit has lowered.
        """
        while True:
            try:
                async with self._changing:
                    await self._load()
                    lowered = self._today().lowered
                    pools = await self._all_pools() if self._max_dollars or lowered else []
                    if not (self._max_dollars or any(pool.name in lowered for pool in pools)):
                        return
                    await self._update(pools)
            except Exception as error:  # noqa: BLE001 - Modal or the store; the next round counts the time again
                _log.warning("What the pools cost could not be counted: %s", type(error).__name__)
            await asyncio.sleep(INTERVAL_S)

    @property
    def spent(self) -> tuple[float, float] | None:
        """Dollars of the day, as they were counted last, and their limit; None: there is no limit, or no count yet."""
        if self._day is None or not self._max_dollars:
            return None
        return self._day.dollars if self._day.day == date_of(self._clock()) else 0.0, self._max_dollars

    def check_day(self) -> None:
        """Refuse a request after the stop.

        Raises:
            APIError: 503 `daily_limit_reached`, until the day ends.
        """
        day = self._day
        if day is None or not day.is_stopped(self._clock()):
            return
        left_s = end_of(day.day) - self._clock()
        raise APIError(
            503,
            f"The service has used ${day.dollars:.2f} of the ${self._max_dollars} that it may cost on {day.day} "
            f"(SERVICE_MAX_DOLLARS_PER_DAY). It answers again when the day ends: {_iso(end_of(day.day))}.",
            code="daily_limit_reached",
            headers={"Retry-After": str(max(1, round(left_s)))},
        )

    async def admit(self, pool: SpendingPool) -> None:
        """Allow a wake; a pool that has replicas needs no permission for more GPUs.

        Raises:
            APIError: 503 `gpu_limit_reached` or `daily_limit_reached`.
        """
        async with self._changing:
            await self._load()
            self.check_day()
            known = self._today().running.get(pool.name)
            if known and self._clock() < known.until:  # it is up: a request after a pause costs no call to Modal
                return
            pools = await self._all_pools() if self._max_gpus else [pool]
            counts = await self._update(pools, all_of_them=False)
            self.check_day()
            if counts[pool.name]:
                return
            await self._check_gpus(pool, pools, counts)
            await self._admitted(pool)

    async def why_not(self, pool: SpendingPool) -> str | None:
        """Return why a pool must not be kept up now; None: it may."""
        async with self._changing:
            await self._load()
            try:
                self.check_day()
                if self._max_gpus:
                    pools = await self._all_pools()
                    counts = await self._count(pools)
                    if not counts[pool.name]:
                        await self._check_gpus(pool, pools, counts)
            except APIError as error:
                return error.message
        return None

    async def _all_pools(self) -> list[SpendingPool]:
        day, self._raised = self._today(), await self._kept_warm()
        return list(self.pools({*day.running, *day.lowered, *self._raised}))

    async def _check_gpus(self, pool: SpendingPool, pools: list[SpendingPool], counts: dict[str, int]) -> None:
        if self._max_gpus is None:
            return
        others = [other for other in pools if other is not pool]
        used, begun = await self._gpus_used(others, counts)
        if used + pool.n_gpu > self._max_gpus and begun:  # a replica that came up between both counts was counted twice
            used, _ = await self._gpus_used(others, await self._count(others))
        if used + pool.n_gpu <= self._max_gpus:
            return
        never = pool.n_gpu > self._max_gpus
        then = "" if never else " Send the request again when another model has ended, or use one that is up."
        raise APIError(
            503,
            f"{pool.name} was not woken: it needs {pool.n_gpu} GPUs, {used} are in use, and the service may use "
            f"{self._max_gpus} (SERVICE_MAX_GPUS).{then}",
            code="gpu_limit_reached",
            retry_after_s=None if never else _GPUS_RETRY_S,
        )

    async def _gpus_used(self, pools: list[SpendingPool], counts: dict[str, int]) -> tuple[int, int]:
        """Return the GPUs that are in use, and how many of them are those of wakes that have no replica yet."""
        known = sum(pool.n_gpu * max(counts[pool.name], pool.is_waking) for pool in pools)
        begun = sum(pool.n_gpu for pool in pools if pool.is_waking and not counts[pool.name])
        return max(known, await self._gpus_up() + begun), begun

    async def _admitted(self, pool: SpendingPool) -> None:
        """Record a wake."""
        day, now = self._today(), self._clock()
        price = pool.current_price
        day.running[pool.name] = Running(replicas=1, dollars_per_hour=price, until=now + self._idle_timeout_s)
        if not day.woken:
            day.woken = True
            self._notify("first_wake", f"First wake on {day.day}: {pool.name}, ${price:.2f}/h.", {"pool": pool.name})
        await self._apply(pool)
        await self._save()

    async def _update(self, pools: list[SpendingPool], *, all_of_them: bool = True) -> dict[str, int]:
        """Count the replicas of pools, and what all have cost until now."""
        counts = await self._count(pools)
        now = self._clock()
        self._charge(counts, now)
        day = self._today()
        for pool in pools:
            day.running.pop(pool.name, None)
            if counts[pool.name]:
                day.running[pool.name] = Running(
                    replicas=counts[pool.name],
                    dollars_per_hour=pool.current_price,
                    until=now + self._idle_timeout_s,
                )
        self._stop_at_limit()
        if all_of_them:
            for pool in pools:
                await self._apply(pool)
            await self._save()
        return counts

    def _charge(self, counts: dict[str, int], now: float) -> None:
        """Add what the replicas that were counted last have cost since then, of what is today."""
        before, today = self._today(), date_of(now)
        began = max(before.at, end_of(today) - 24 * _HOUR_S)
        dollars = 0.0 if before.day != today else before.dollars
        for name, one in before.running.items():
            end = now if counts.get(name, 0) else min(now, one.until)
            dollars += max(0.0, end - began) * one.replicas * one.dollars_per_hour / _HOUR_S
        is_new = before.day != today
        self._day = before.model_copy(
            update={
                **{"day": today, "at": now, "dollars": dollars},
                **({"woken": False, "stopped": False} if is_new else {}),
            }
        )

    def _stop_at_limit(self) -> None:
        day = self._today()
        if not self._max_dollars or day.stopped or day.dollars < self._max_dollars:
            return
        day.stopped = True
        until = _iso(end_of(day.day))
        used = f"${day.dollars:.2f} of ${self._max_dollars} are used on {day.day}"
        text = f"Stopped: {used}. No model answers until {until}."
        _log.warning("%s", text)
        self._notify("daily_stop", text, {"dollars": round(day.dollars, 2), "until": until})

    async def _apply(self, pool: SpendingPool) -> None:
        """Scale a pool that runs to zero after the stop; give its autoscaler the settings back on the next day.

        The replica of a schedule is not given back: the schedule raises the pool again, unless it has ended meanwhile.
        Where Modal does not take that now, the next round tries again: no pool keeps others from being scaled.
        """
        day = self._today()
        try:
            if day.stopped and pool.name in day.running:
                settings = dict(await pool.scale_to_zero())
                if self._raised.get(pool.name) and settings.get("min_containers") == 1:
                    del settings["min_containers"]
                day.lowered.setdefault(pool.name, settings)
            elif not day.stopped and (lowered := day.lowered.get(pool.name)):
                await pool.restore(lowered)
                del day.lowered[pool.name]
        except Exception as error:  # noqa: BLE001 - Modal's client raises many
            _log.warning("The autoscaler of %s was not changed: %s", pool.name, type(error).__name__)

    async def _count(self, pools: list[SpendingPool]) -> dict[str, int]:
        """Return the replicas of pools; what Modal does not tell now is as it was."""
        slots, known = asyncio.Semaphore(_AT_ONCE), self._today().running

        async def count(pool: SpendingPool) -> int:
            async with slots:
                try:
                    async with asyncio.timeout(_COUNT_TIMEOUT_S):
                        return await pool.count_replicas()
                except Exception as error:  # noqa: BLE001 - Modal's client raises many
                    _log.warning("The replicas of %s were not counted: %s", pool.name, type(error).__name__)
                    return known[pool.name].replicas if pool.name in known else 0

        numbers = await asyncio.gather(*map(count, pools))
        return {pool.name: number for pool, number in zip(pools, numbers, strict=True)}

    def _today(self) -> Day:
        if self._day is None:
            now = self._clock()
            self._day = Day(day=date_of(now), at=now)
        return self._day

    async def _load(self) -> None:
        await self._refresh()
        if self._day is None:
            self._day = day = Day.of_record(await self._store.load())
            if day and (self._max_dollars is None or day.dollars < self._max_dollars):
                day.stopped = False  # a deploy since has raised the limit, or removed it

    async def _save(self) -> None:
        await self._store.save(self._today().model_dump())


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
