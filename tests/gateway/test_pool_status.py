"""The operators' routes about pools: reading wakes nothing, wake and stop do what they say, for admin keys alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from service.gateway.call_rate import CallRate
from service.gateway.clients import ClientRegistry
from service.gateway.pool import Endpoint, State
from service.gateway.pool_status import engine_figures
from service.usage.limits import KeyLimits
from tests.gateway.upstream import (
    ALICE,
    ASK,
    BOB,
    KEYS,
    Engine,
    Request,
    RunningGateway,
    eventually,
    serve_gateway,
    streams,
)

ADMINS = {"alice": KeyLimits(admin=True)}
METRICS = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 2.0
vllm:num_requests_running{engine="1",model_name="tiny"} 3.0
vllm:num_requests_waiting{engine="0",model_name="tiny"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="tiny"} 0.5
vllm:num_preemptions_total{engine="0",model_name="tiny"} 4.0
vllm:generation_tokens_total{engine="0",model_name="tiny"} 1.2e+03
"""


async def metrics(request: Request, writer: asyncio.StreamWriter) -> None:
    """Answer as an engine's `/metrics`."""
    assert request.line.startswith("GET /metrics")
    assert request.headers["authorization"] == "Bearer of-the-pool"
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: %d\r\n\r\n" % len(METRICS) + METRICS)
    await writer.drain()


async def pools(gateway: RunningGateway) -> dict[str, Any]:
    """Return the pools by name."""
    async with gateway.http.get(gateway.url + "/admin/pools", headers=ALICE) as answer:
        assert answer.status == 200
        return {row["name"]: row for row in (await answer.json())["data"]}


def test_pools_engine_figures_are_summed_over_its_cores() -> None:
    """Of the KV cache the fullest one counts."""
    assert engine_figures(METRICS) == {
        "num_requests_running": 5.0,
        "num_requests_waiting": 1.0,
        "kv_cache_usage_perc": 0.5,
        "num_preemptions": 4.0,
        "generation_tokens": 1200.0,
    }


def test_pools_of_others_are_for_admin_keys() -> None:
    """Another key gets 403, and nothing wakes."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS, ADMINS)) as gateway:
            for method, path in (("get", "pools"), ("get", "boots"), ("post", "pools/wake"), ("post", "pools/stop")):
                send = getattr(gateway.http, method)
                async with send(f"{gateway.url}/admin/{path}", headers=BOB) as answer:
                    assert (answer.status, (await answer.json())["error"]["code"]) == (403, "admin_only")
            assert all(pool.wakes == 0 for pool in gateway.pools.values())

    asyncio.run(run())


def test_pools_are_read_without_a_wake() -> None:
    """However often a console looks."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS, ADMINS)) as gateway:
            for _ in range(3):
                assert {name: row["state"] for name, row in (await pools(gateway)).items()} == {
                    "tiny": "cold",
                    "other": "cold",
                }
            assert all(pool.wakes == 0 and pool.in_use == 0 for pool in gateway.pools.values())

    asyncio.run(run())


def test_pools_wake_and_stop_on_command() -> None:
    """Wake answers at once; the state goes from cold over waking to ready, and after a stop it is cold."""

    async def run() -> None:
        async with (
            Engine(metrics).serving() as engine,
            serve_gateway(ClientRegistry(KEYS, ADMINS)) as gateway,
        ):
            await pools(gateway)
            pool = gateway.pools["tiny"]
            pool.url = engine.url
            async with gateway.post({"model": "small"}, "/admin/pools/wake", headers=ALICE) as answer:
                assert (answer.status, await answer.json()) == (202, {"model": "tiny", "state": "waking"})
            row = (await pools(gateway))["tiny"]
            assert (row["state"], row["engine"]) == ("waking", None)
            assert row["waking_s"] > 0
            async with gateway.post({"model": "tiny"}, "/admin/pools/stop", headers=ALICE) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (409, "pool_is_waking")
            pool.may_wake.set()
            await eventually(lambda: pool.state == "ready")
            row = (await pools(gateway))["tiny"]
            assert row["state"] == "ready"
            assert row["usual_s"] is not None
            assert row["engine"]["kv_cache_usage_perc"] == 0.5
            async with gateway.post({"model": "tiny"}, "/admin/pools/stop", headers=ALICE) as answer:
                assert answer.status == 202
            assert (await pools(gateway))["tiny"]["state"] == "cold"
            assert pool.wakes == 1

    asyncio.run(run())


def test_pools_stop_that_runs_at_the_end_of_the_gateway_is_awaited() -> None:
    """What it has to give back at its end is known to nobody else."""
    ended: list[str] = []

    async def stop() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            ended.append("tiny")

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS, ADMINS)) as gateway:
            await pools(gateway)
            gateway.pools["tiny"].stop = stop  # type: ignore[method-assign]
            async with gateway.post({"model": "tiny"}, "/admin/pools/stop", headers=ALICE) as answer:
                assert answer.status == 202
        assert ended == ["tiny"]

    asyncio.run(run())


def test_pools_that_were_looked_at_while_they_stopped_are_looked_at_again_after() -> None:
    """A replica takes a while to end; what an open console was told of it meanwhile does not last."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS, ADMINS)) as gateway:
            async with gateway.http.get(f"{gateway.url}/v1/models/tiny", headers=ALICE):
                pool, ended = gateway.pools["tiny"], asyncio.Event()

            async def probe() -> State:
                return "cold" if ended.is_set() else "ready"

            pool.probe, pool.stop = probe, ended.wait  # type: ignore[method-assign, assignment]
            async with gateway.post({"model": "tiny"}, "/admin/pools/stop", headers=ALICE) as answer:
                assert answer.status == 202
            assert (await pools(gateway))["tiny"]["state"] == "ready"
            ended.set()
            await asyncio.sleep(0.05)
            assert (await pools(gateway))["tiny"]["state"] == "cold"

    asyncio.run(run())


def test_pools_that_failed_say_why_until_they_are_woken_again() -> None:
    """`/v1/models` says it too."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS, ADMINS)) as gateway:
            await pools(gateway)
            pool = gateway.pools["tiny"]
            pool.fails = "CUDA out of memory."
            pool.may_wake.set()
            async with gateway.post({"model": "tiny"}, "/admin/pools/wake", headers=ALICE) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (503, "model_failed")
            row = (await pools(gateway))["tiny"]
            assert (row["state"], row["reason"]) == ("failed", "CUDA out of memory.")
            async with gateway.http.get(gateway.url + "/v1/models/tiny", headers=BOB) as answer:
                assert (await answer.json())["state"] == "failed"

    asyncio.run(run())


def test_pools_that_failed_are_woken_at_once_when_an_operator_asks() -> None:
    """Requests get the failure again for a while; an operator may have mended its cause."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS, ADMINS)) as gateway:
            await pools(gateway)
            pool = gateway.pools["tiny"]
            pool.fails = "CUDA out of memory."
            pool.may_wake.set()
            for wakes in (1, 2):
                async with gateway.post({"model": "tiny"}, "/admin/pools/wake", headers=ALICE) as answer:
                    assert answer.status == 503
                async with gateway.post(ASK, headers=ALICE) as answer:
                    assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
                assert pool.wakes == wakes

    asyncio.run(run())


def test_pools_on_another_gpu_are_listed_once_they_were_named() -> None:
    """With a name that finds them."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS, ADMINS)) as gateway:
            async with gateway.post({"model": "other-h200"}, "/admin/pools/wake", headers=ALICE) as answer:
                assert answer.status == 202
            found = await pools(gateway)
            assert {*found} == {"other-h200", "tiny", "other"}
            assert found["other-h200"]["state"] == "waking"
            gateway.pools["other H200"].may_wake.set()

    asyncio.run(run())


def test_pools_behind_modal_are_asked_only_while_they_answer() -> None:
    """Any request to a container keeps it alive, and a console that is open all day would pay for it."""

    async def run() -> None:
        engine = Engine(streams(b"data: 1\n\n", ends=False))
        async with engine.serving(), serve_gateway(ClientRegistry(KEYS, ADMINS), url=engine.url) as gateway:
            await pools(gateway)
            pool = gateway.pools["tiny"]
            pool._endpoint = Endpoint(engine.url, headers={"Authorization": "Bearer of-the-pool"}, own_calls=CallRate())
            for _ in range(3):
                assert (await pools(gateway))["tiny"]["engine"] is None
            assert engine.requests == []
            async with gateway.post(ASK | {"stream": True}, headers=ALICE) as answer:
                await answer.content.readany()
                engine.behaviour = metrics
                assert (await pools(gateway))["tiny"]["engine"]["num_requests_running"] == 5.0
                assert (await pools(gateway))["tiny"]["engine"]["num_requests_running"] == 5.0
            assert len(engine.requests) == 2  # consoles that look within a second share an answer

    asyncio.run(run())


@pytest.mark.parametrize("body", [{}, {"model": 1}, {"model": "tiny", "more": 1}, [], "tiny", {"model": "nope"}])
def test_pools_wrong_body_is_refused(body: object) -> None:
    """400, or 404 for a model that is not there; nothing wakes."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS, ADMINS)) as gateway:
            for what in ("wake", "stop"):
                async with gateway.post(body, f"/admin/pools/{what}", headers=ALICE) as answer:
                    assert answer.status == (404 if body == {"model": "nope"} else 400)
            assert all(pool.wakes == 0 for pool in gateway.pools.values())

    asyncio.run(run())


def test_pools_body_of_invalid_utf8_is_refused() -> None:
    """400, as at the routes about keys."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS, ADMINS)) as gateway:
            headers = ALICE | {"content-type": "application/json"}
            for what in ("wake", "stop"):
                url = f"{gateway.url}/admin/pools/{what}"
                async with gateway.http.post(url, data=b'{"model": "tiny\xff"}', headers=headers) as answer:
                    assert answer.status == 400
                    assert (await answer.json())["error"]["param"] == "model"

    asyncio.run(run())


def test_pools_that_a_client_may_not_use_are_not_probed_again_after_it_has_looked() -> None:
    """What was read of the others is kept: a probe is a call of Modal's."""
    probes: list[str] = []

    async def run() -> None:
        both = {"alice": KeyLimits(admin=True), "bob": KeyLimits(admin=True)}
        clients = ClientRegistry(KEYS, both, {"bob": frozenset({"tiny"})})
        async with serve_gateway(clients) as gateway:
            await pools(gateway)
            pool = gateway.pools["other"]

            async def probe() -> State:
                probes.append("other")
                return "cold"

            pool.probe = probe  # type: ignore[method-assign]
            async with gateway.http.get(gateway.url + "/admin/pools", headers=BOB) as answer:
                assert [row["name"] for row in (await answer.json())["data"]] == ["tiny"]
            await pools(gateway)

    asyncio.run(run())
    assert probes == []


def test_key_route_tells_name_rights_and_limits() -> None:
    """What a console shows of the key that it has."""

    async def run() -> None:
        limits = ADMINS | {"bob": KeyLimits(requests_per_minute=5)}
        async with serve_gateway(ClientRegistry(KEYS, limits)) as gateway:
            for headers, expected in (
                (ALICE, {"name": "alice", "admin": True, "anonymous": False, "limits": {}}),
                (BOB, {"name": "bob", "admin": False, "anonymous": False, "limits": {"requests_per_minute": 5}}),
            ):
                async with gateway.http.get(gateway.url + "/v1/key", headers=headers) as answer:
                    assert await answer.json() == expected
        async with serve_gateway() as gateway, gateway.http.get(gateway.url + "/v1/key") as answer:
            assert await answer.json() == {"name": "anonymous", "admin": True, "anonymous": True, "limits": {}}

    asyncio.run(run())
