"""The limits of spending, with pools and a clock of the test's own: what is refused, counted, told and remembered."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from service.gateway.app import create_app
from service.gateway.clients import ClientRegistry
from service.gateway.gauges import SpendGauges
from service.gateway.metrics import Metrics
from service.gateway.modal_pool import ModalPool
from service.gateway.router import ModelRouter
from service.gateway.spending import SpendGuard
from service.gateway.tiers import Tiers
from service.in_engine.vllm_service.api_error import APIError
from service.modal_app import spend_limits
from service.modal_app.gateway_deployment import GatewayDeployment
from service.modal_app.warm import Schedules
from service.registry.gpus import find_gpu
from service.registry.models import Registry
from service.registry.tiers import Tier
from service.settings import Settings
from tests.gateway.test_modal_pool import healthy
from tests.gateway.upstream import ASK, STREAMED, Engine, Request, answers, serving

NOON = datetime(2026, 11, 29, 12, tzinfo=UTC).timestamp()
HOUR, DAY = 3600.0, 86400.0


@dataclass
class OnePool:
    """A pool whose replicas the test sets."""

    name: str
    replicas: int = 0
    n_gpu: int = 1
    current_price: float = 4.0
    is_waking: bool = False
    asked: int = 0
    settings: dict[str, int] = field(default_factory=lambda: {"min_containers": 1, "scaledown_window": 900})
    fails: bool = False
    refuses: bool = False

    async def count_replicas(self) -> int:
        """Return them, or fail."""
        self.asked += 1
        if self.fails:
            raise OSError("gone")
        return self.replicas

    async def scale_to_zero(self) -> dict[str, int]:
        """Do so at once, or fail."""
        if self.refuses:
            raise OSError("gone")
        before, self.settings, self.replicas = self.settings, {"min_containers": 0, "scaledown_window": 2}, 0
        return before

    async def restore(self, settings: dict[str, int]) -> None:
        """Take them, or fail; those that are not given stay."""
        if self.refuses:
            raise OSError("gone")
        self.settings = self.settings | settings


@dataclass
class Service:
    """A guard with its surroundings: `record` outlives it."""

    pools: list[OnePool]
    record: dict[str, Any] | None = None
    now: float = NOON
    told: list[tuple[str, str, dict[str, object]]] = field(default_factory=list)

    async def load(self) -> dict[str, Any] | None:
        """Return what was saved last."""
        return self.record

    async def save(self, record: dict[str, Any]) -> None:
        """Keep it."""
        self.record = record

    def guard(self, **limits: Any) -> SpendGuard:
        """Return a guard as a gateway that starts makes it."""

        def notify(event: str, text: str, fields: Mapping[str, object]) -> None:
            self.told.append((event, text, dict(fields)))

        guard = SpendGuard(self, notify=notify, clock=lambda: self.now, **limits)
        guard.pools = lambda _: self.pools
        return guard


async def tick(guard: SpendGuard) -> None:
    """Count once, as `run` does every half minute."""
    await guard._load()
    await guard._update(await guard._all_pools())


async def refused(guard: SpendGuard, pool: OnePool) -> APIError:
    """Return the error of a wake."""
    with pytest.raises(APIError) as caught:
        await guard.admit(pool)
    return caught.value


def test_wake_above_the_gpu_limit_is_503_with_the_reason_and_a_warm_pool_goes_on() -> None:
    """GPUs are counted over all pools, those of a wake too; a pool with replicas needs none."""

    async def run() -> None:
        warm, waking, cold = OnePool("a on H100", 1), OnePool("b on 2 x H200", n_gpu=2), OnePool("c on L4")
        guard = Service([warm, waking, cold]).guard(max_gpus=3)
        await guard.admit(waking)
        waking.is_waking = True
        error = await refused(guard, cold)
        assert (error.status, error.code, error.headers["Retry-After"]) == (503, "gpu_limit_reached", "30")
        assert error.message == (
            "c on L4 was not woken: it needs 1 GPUs, 3 are in use, and the service may use 3 (SERVICE_MAX_GPUS). Send "
            "the request again when another model has ended, or use one that is up."
        )
        await guard.admit(warm)
        warm.replicas = 0
        await guard.admit(cold)

    asyncio.run(run())


def test_pool_that_a_schedule_keeps_up_counts_for_the_gpu_limit() -> None:
    """Although the gateway was never asked for it; and the limits hold for what is to be kept up."""

    async def run() -> None:
        kept, cold = OnePool("a on 2 x H200", 1, n_gpu=2), OnePool("b on H100")
        service = Service([cold, kept])

        async def kept_warm() -> dict[str, bool]:
            return {kept.name: True}

        guard = service.guard(max_gpus=2, kept_warm=kept_warm)
        guard.pools = lambda names: [pool for pool in service.pools if pool is cold or pool.name in names]
        assert "it needs 1 GPUs, 2 are in use" in (await refused(guard, cold)).message
        assert "it needs 1 GPUs, 2 are in use" in str(await guard.why_not(cold))
        assert await guard.why_not(kept) is None
        kept.replicas = 0
        assert (await guard.why_not(cold), await guard.why_not(kept)) == (None, None)
        await guard.admit(cold)

    asyncio.run(run())


def test_replicas_of_pools_that_nobody_has_asked_for_count_for_the_gpu_limit() -> None:
    """Such as those that `scale` keeps up on another tier; a pool that is waking counts beside them, and once."""

    async def run() -> None:
        waking, cold = OnePool("a on H100", is_waking=True), OnePool("b on H100")
        up = 2

        async def gpus_up() -> int:
            return up

        guard = Service([waking, cold]).guard(max_gpus=3, gpus_up=gpus_up)
        assert "it needs 1 GPUs, 3 are in use" in (await refused(guard, cold)).message
        up, waking.replicas = 3, 1
        assert "it needs 1 GPUs, 3 are in use" in (await refused(guard, cold)).message
        up = 2
        await guard.admit(cold)

    asyncio.run(run())


def test_replica_that_comes_up_while_gpus_are_counted_counts_once() -> None:
    """It is waking at the first count and up at the second; a wake that fits beside it is not refused."""

    async def run() -> None:
        waking, cold = OnePool("a on H100", is_waking=True), OnePool("b on H100")

        async def gpus_up() -> int:
            waking.replicas = 1
            return 1

        guard = Service([waking, cold]).guard(max_gpus=2, gpus_up=gpus_up)
        await guard.admit(cold)

    asyncio.run(run())


def test_pool_is_not_kept_up_after_the_stop_of_a_day() -> None:
    """The reason is that of a request."""

    async def run() -> None:
        service = Service([OnePool("a on H100", 1)])
        guard, (pool,) = service.guard(max_dollars_per_day=4), service.pools
        await tick(guard)
        assert await guard.why_not(pool) is None
        service.now += HOUR
        await tick(guard)
        assert str(await service.guard(max_dollars_per_day=4).why_not(pool)).startswith("The service has used $4.00 of")

    asyncio.run(run())


def test_wake_of_a_pool_larger_than_the_gpu_limit_says_that_no_retry_helps() -> None:
    """Its replica alone has more."""

    async def run() -> None:
        large = OnePool("large on 8 x H200", n_gpu=8)
        error = await refused(Service([large]).guard(max_gpus=4), large)
        assert (error.code, error.headers) == ("gpu_limit_reached", {"x-should-retry": "false"})

    asyncio.run(run())


def test_two_wakes_at_once_do_not_pass_the_gpu_limit_together() -> None:
    """The second one sees the first."""

    async def run() -> None:
        one, two = OnePool("a on H100"), OnePool("b on H100")
        guard = Service([one, two]).guard(max_gpus=1)

        async def wake(pool: OnePool) -> bool:
            pool.is_waking = True  # as a pool is before it asks
            try:
                await guard.admit(pool)
            except APIError:
                pool.is_waking = False
                return False
            return True

        assert sum(await asyncio.gather(wake(one), wake(two))) == 1

    asyncio.run(run())


def test_pool_that_is_up_costs_no_count_for_a_request_after_a_pause() -> None:
    """Modal is asked again when it may have ended."""

    async def run() -> None:
        service = Service([OnePool("a on H100")])
        guard, (pool,) = service.guard(max_gpus=1, idle_timeout_s=900), service.pools
        await guard.admit(pool)
        pool.replicas, asked = 1, pool.asked
        service.now += 800
        await guard.admit(pool)
        assert pool.asked == asked
        service.now += 200
        await guard.admit(pool)
        assert pool.asked == asked + 1

    asyncio.run(run())


def test_day_above_its_dollars_stops_all_pools_until_midnight() -> None:
    """No wake, no request to a warm pool; what runs is scaled to zero, and gets its settings back the next day."""

    async def run() -> None:
        service = Service([OnePool("a on H100"), OnePool("b on H100")])
        guard, (pool, other) = service.guard(max_dollars_per_day=10), service.pools
        await guard.admit(pool)
        pool.replicas = 1
        for _ in range(2):
            service.now += HOUR
            await tick(guard)
        guard.check_day()
        service.now += HOUR
        await tick(guard)
        assert (pool.replicas, pool.settings["min_containers"]) == (0, 0)
        for check in (guard.admit(pool), guard.admit(other)):
            with pytest.raises(APIError) as caught:
                await check
            error = caught.value
            assert (error.status, error.code) == (503, "daily_limit_reached")
            assert error.headers == {"Retry-After": str(9 * 3600), "x-should-retry": "false"}
            assert error.message == (
                "The service has used $12.00 of the $10 that it may cost on 2026-11-29 (SERVICE_MAX_DOLLARS_PER_DAY). "
                "It answers again when the day ends: 2026-11-30T00:00:00Z."
            )
        with pytest.raises(APIError):
            guard.check_day()
        assert [(event, fields) for event, _, fields in service.told] == [
            ("first_wake", {"pool": "a on H100"}),
            ("daily_stop", {"dollars": 12.0, "until": "2026-11-30T00:00:00Z"}),
        ]
        service.now = NOON + DAY / 2
        guard.check_day()
        await tick(guard)
        assert pool.settings == {"min_containers": 1, "scaledown_window": 900}
        await guard.admit(pool)
        assert [event for event, _, _ in service.told] == ["first_wake", "daily_stop", "first_wake"]

    asyncio.run(run())


def test_day_above_its_dollars_ends_the_answers_of_a_pool_that_requests_keep_up() -> None:
    """Its replica never is idle, so the scale to zero alone would not end it, and every request would be answered."""

    async def behave(request: Request, writer: asyncio.StreamWriter) -> None:
        await (healthy if request.line.startswith("GET /health") else answers)(request, writer)

    async def run() -> None:
        service = Service([OnePool("qwen3-8b on H100", 1)])
        guard, registry = service.guard(max_dollars_per_day=4), Registry.load()
        tiers = Tiers(Settings(app="team"), {"Modal-Key": "x"}, guard=guard)
        pool = tiers.pool(registry.specs["qwen3-8b"], None)
        router = ModelRouter(registry, "qwen3-8b", tiers.pool)
        app = create_app(router, ClientRegistry({}), Metrics(), hold_s=5)
        async with Engine(behave).serving() as engine, serving(app) as url, aiohttp.ClientSession() as http:
            pool._tier._url = engine.url
            service.pools = [one := OnePool(pool.name, 1)]

            async def ask(body: dict[str, Any]) -> int:
                body = body | {"model": "qwen3-8b"}
                async with http.post(f"{url}/v1/chat/completions", json=body) as answer:
                    return answer.status

            pool.count_replicas = one.count_replicas  # type: ignore[method-assign]
            assert await ask(ASK) == 200
            await tick(guard)
            service.now += HOUR
            await tick(guard)
            assert pool.endpoint(), "it answered a moment ago"
            assert [await ask(ASK), await ask(STREAMED)] == [503, 503]
            assert len([one for one in engine.requests if one.line.startswith("POST")]) == 1

    asyncio.run(run())


def test_pool_that_modal_does_not_scale_keeps_no_other_up_after_the_stop() -> None:
    """The stop is recorded all the same, and each round tries again."""

    async def run() -> None:
        service = Service([OnePool("a on H100", 1), OnePool("b on L40S", 1)])
        guard, (stuck, other) = service.guard(max_dollars_per_day=4), service.pools
        await tick(guard)
        stuck.refuses = True
        service.now += HOUR
        await tick(guard)
        assert (stuck.replicas, other.replicas) == (1, 0)
        assert service.record
        assert (service.record["stopped"], [*service.record["lowered"]]) == (True, [other.name])
        stuck.refuses = False
        await tick(guard)
        assert stuck.replicas == 0

    asyncio.run(run())


def test_settings_that_modal_does_not_take_are_given_back_later() -> None:
    """A wake goes on without them, and the next round tries again."""

    async def run() -> None:
        service = Service([OnePool("a on H100", 1)])
        guard, (pool,) = service.guard(max_dollars_per_day=4), service.pools
        before = pool.settings
        await tick(guard)
        service.now += HOUR
        await tick(guard)
        service.now += DAY
        pool.refuses = True
        await guard.admit(pool)
        assert service.record
        assert service.record["lowered"] == {pool.name: before}
        pool.refuses = False
        await tick(guard)
        assert (pool.settings, service.record["lowered"]) == (before, {})

    asyncio.run(run())


def test_replica_of_a_schedule_is_not_given_back_after_the_stop() -> None:
    """The schedule may have ended meanwhile, and then nobody would lower the pool again; one that goes on raises it."""

    async def run() -> None:
        raised, own, more = OnePool("a on H100", 1), OnePool("b on H100", 1), OnePool("c on H100", 1)
        more.settings = {"min_containers": 2, "scaledown_window": 900}  # by `scale`, after the schedule had raised it
        service = Service([raised, own, more])

        async def kept_warm() -> dict[str, bool]:
            return {raised.name: True, own.name: False, more.name: True}

        guard = service.guard(max_dollars_per_day=12, kept_warm=kept_warm)
        await tick(guard)
        service.now += HOUR
        await tick(guard)
        assert [pool.settings["min_containers"] for pool in service.pools] == [0, 0, 0]
        service.now += DAY
        await tick(guard)
        assert [pool.settings["min_containers"] for pool in service.pools] == [0, 1, 2]
        assert {pool.settings["scaledown_window"] for pool in service.pools} == {900}
        raised.settings["min_containers"] = 1  # as its schedule does on the next day
        await tick(guard)
        assert raised.settings["min_containers"] == 1

    asyncio.run(run())


def test_gateway_that_starts_again_remembers_the_day() -> None:
    """The stop holds, and nobody is told twice."""

    async def run() -> None:
        service = Service([OnePool("a on H100")])
        guard, (pool,) = service.guard(max_dollars_per_day=1), service.pools
        await guard.admit(pool)
        pool.replicas = 1
        service.now += HOUR
        await tick(guard)
        again = service.guard(max_dollars_per_day=1)
        assert (await refused(again, pool)).code == "daily_limit_reached"
        await tick(again)
        assert [event for event, _, _ in service.told] == ["first_wake", "daily_stop"]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("limits", "goes_on"), [({"max_dollars_per_day": 13}, True), ({"max_dollars_per_day": 11}, False), ({}, True)]
)
def test_deploy_that_raises_or_removes_the_limit_ends_the_stop(limits: dict[str, Any], goes_on: bool) -> None:
    """On the same day, with the settings that the pools had before; a limit that is reached already stops on."""

    async def run() -> None:
        service = Service([OnePool("a on H100", 1)])
        guard, (pool,) = service.guard(max_dollars_per_day=10), service.pools
        before = pool.settings
        await tick(guard)
        service.now += 3 * HOUR
        await tick(guard)
        assert pool.settings["scaledown_window"] == 2
        again = service.guard(**limits)
        running = asyncio.create_task(again.run())
        await asyncio.wait({running}, timeout=0.1)
        running.cancel()
        assert (pool.settings == before) is goes_on
        if goes_on:
            await again.admit(pool)
        else:
            assert "$12.00 of the $11" in (await refused(again, pool)).message
        assert [event for event, _, _ in service.told] == ["daily_stop", *(["first_wake"] if goes_on else [])]

    asyncio.run(run())


def test_gateway_without_any_limit_gives_back_what_an_earlier_one_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its replicas would end after two idle seconds until their tier is deployed again, and each end is a boot."""
    settings = {"min_containers": 1, "scaledown_window": 900}
    record = {"day": "2026-11-29", "at": NOON, "stopped": True, "lowered": {"qwen3-8b on H100": settings}}
    given: list[tuple[str, dict[str, int]]] = []

    async def restore(pool: ModalPool, lowered: dict[str, int]) -> None:
        given.append((pool.name, lowered))

    async def nothing(*_: object) -> int:
        return 0

    monkeypatch.setattr(spend_limits, "DictStore", lambda _: Service([], record))
    monkeypatch.setattr(spend_limits.GatewayPrices, "refresh", nothing)
    monkeypatch.setattr(Schedules, "all", lambda _: [])
    monkeypatch.setattr(ModalPool, "count_replicas", nothing)
    monkeypatch.setattr(ModalPool, "restore", restore)

    async def run() -> None:
        _, guard, watch = spend_limits.limited_tiers(GatewayDeployment(Settings(), Registry.load()), {})
        assert guard is None, "requests are not counted"
        watching = asyncio.create_task(watch())
        await asyncio.wait({watching}, timeout=0.2)
        watching.cancel()

    asyncio.run(run())
    assert given == [("qwen3-8b on H100", settings)]


def test_service_without_a_limit_a_day_counts_nothing_beside() -> None:
    """What would count ends at once, and has saved nothing; a pool that a models file has no more is no work."""

    async def run() -> None:
        service = Service([OnePool("a on H100", 1)])
        await asyncio.wait_for(service.guard().run(), 1)
        record = {"day": "2026-11-29", "at": NOON, "lowered": {"gone on H100": {"min_containers": 1}}}
        await asyncio.wait_for(Service(service.pools, record).guard().run(), 1)
        await asyncio.wait_for(service.guard(max_gpus=2).run(), 1)
        assert (service.pools[0].asked, service.record) == (0, None)

    asyncio.run(run())


@pytest.mark.parametrize(("replicas", "dollars"), [(0, 4.0 * 900 / HOUR), (1, 8.0)])
def test_time_without_a_gateway_counts_as_long_as_a_replica_may_have_run(replicas: int, dollars: float) -> None:
    """One that has ended has cost its idle timeout at most; one that is up has been so all the time."""

    async def run() -> None:
        service = Service([OnePool("a on H100")])
        guard, (pool,) = service.guard(max_dollars_per_day=100, idle_timeout_s=900), service.pools
        await guard.admit(pool)
        pool.replicas = replicas
        service.now += 2 * HOUR
        again = service.guard(max_dollars_per_day=100)
        await tick(again)
        assert service.record
        assert service.record["dollars"] == pytest.approx(dollars)

    asyncio.run(run())


def test_day_that_begins_counts_only_its_own_part() -> None:
    """A replica that ran over midnight has cost the new day what came after it."""

    async def run() -> None:
        service = Service([OnePool("a on H100")], now=NOON + DAY / 2 - HOUR)
        guard, (pool,) = service.guard(max_dollars_per_day=100), service.pools
        await guard.admit(pool)
        pool.replicas = 1
        service.now += 3 * HOUR
        await tick(guard)
        assert service.record
        assert (service.record["day"], service.record["dollars"]) == ("2026-11-30", pytest.approx(8.0))

    asyncio.run(run())


def test_pool_that_modal_does_not_tell_of_counts_as_before() -> None:
    """An error of Modal makes neither a free GPU nor a free hour."""

    async def run() -> None:
        service = Service([OnePool("a on H100", 1), OnePool("b on H100")])
        guard, (pool, cold) = service.guard(max_gpus=1, max_dollars_per_day=100), service.pools
        await tick(guard)
        pool.fails = True
        service.now += HOUR
        await tick(guard)
        assert service.record
        assert service.record["dollars"] == pytest.approx(4.0)
        assert (await refused(guard, cold)).code == "gpu_limit_reached"

    asyncio.run(run())


def test_record_of_another_version_begins_the_day_anew() -> None:
    """It is no error."""

    async def run() -> None:
        service = Service([OnePool("a on H100")], record={"day": 7})
        await service.guard(max_dollars_per_day=1).admit(service.pools[0])
        assert service.record
        assert service.record["day"] == "2026-11-29"

    asyncio.run(run())


def test_pools_of_modal_are_all_those_that_can_be_asked_for() -> None:
    """Each entry's own, and those on other GPUs that were asked for; their names differ."""
    registry = Registry.load()
    tiers = Tiers(Settings(), {})
    spec = registry.specs["qwen3-8b"]
    tiers.pool(spec, find_gpu("L40S"))
    pools = tiers.all(registry.specs, ["qwen3-8b on B200", "qwen3-8b on 2 x H200", "gone on H100", "qwen3-8b on X1"])
    assert len({pool.name for pool in pools}) == len(pools) >= len(registry.specs)
    assert {pool.spec.key for pool in pools} == set(registry.specs)
    own = f"qwen3-8b on {spec.tier.label}"
    assert {pool.name for pool in pools if pool.spec is spec} == {
        *(own, "qwen3-8b on L40S", "qwen3-8b on B200", "qwen3-8b on 2 x H200")
    }


def test_pool_counts_by_the_price_of_the_moment() -> None:
    """The tier's, with its GPUs; where no prices are given that of the table."""
    registry = Registry.load()
    spec, tier = registry.specs["qwen3-8b"], Tier(find_gpu("H200"), 2)
    assert Tiers(Settings(), {}, price=lambda asked: asked.n_gpu * 5.0).pool_on(spec, tier).current_price == 10.0
    pool = Tiers(Settings(), {}).pool_on(spec, tier)
    assert pool.current_price == pool.dollars_per_hour == tier.dollars_per_hour


def test_metrics_show_what_the_day_has_cost_of_its_limit() -> None:
    """Only where there is a limit, once it was counted; the next day begins with 0."""

    async def run() -> None:
        service = Service([OnePool("a on H100", 1)])
        guard, registry = service.guard(max_dollars_per_day=20), CollectorRegistry()
        registry.register(SpendGauges(guard))
        registry.register(SpendGauges(service.guard(max_gpus=2)))
        assert registry.get_sample_value("gateway_day_dollars") is None
        await tick(guard)
        service.now += HOUR
        await tick(guard)
        assert registry.get_sample_value("gateway_day_dollars") == 4.0
        assert registry.get_sample_value("gateway_day_limit_dollars") == 20.0
        service.now += DAY
        assert registry.get_sample_value("gateway_day_dollars") == 0.0

    asyncio.run(run())
