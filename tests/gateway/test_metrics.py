"""The counters, and the request log."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

from service.gateway.call_rate import CallRate
from service.gateway.clients import ClientRegistry
from service.gateway.metrics import Metrics, RequestLog
from service.gateway.pool import Endpoint
from service.usage.database import open_database
from service.usage.ledger import Ledger
from service.usage.limits import KeyLimits
from tests.gateway.upstream import (
    ALICE,
    ASK,
    BOB,
    KEYS,
    Engine,
    RunningGateway,
    answers,
    eventually,
    serve_gateway,
    streams,
)

ADMIN = {"alice": KeyLimits(admin=True)}
ROOT = Path(__file__).parents[2]


def test_metrics_and_request_log_have_client_model_and_amounts() -> None:
    """Neither holds a key or content."""

    async def run() -> None:
        async with (
            Engine(answers).serving() as engine,
            serve_gateway(ClientRegistry(KEYS, ADMIN), url=engine.url) as gateway,
        ):
            async with gateway.post(ASK | {"user": "s3cret"}, headers=ALICE) as answer:
                assert answer.status == 200
            async with gateway.http.get(gateway.url + "/metrics", headers=ALICE) as answer:
                text = await answer.text()
        assert 'gateway_requests_total{key="alice",model="tiny",status="200"} 1.0' in text
        assert re.search(r"^gateway_tasks [1-9]", text, re.M)
        assert "gateway_late_requests_total 0.0" in text
        assert 'gateway_tokens_total{key="alice",kind="completion",model="tiny"} 4.0' in text
        assert 'gateway_cold_starts_total{model="tiny",outcome="ready"} 1.0' in text
        line = json.loads(gateway.lines[0])
        assert (line["key"], line["model"], line["status"], line["prompt_tokens"]) == ("alice", "tiny", 200, 3)
        assert "s3cret" not in text + gateway.lines[0]
        assert "a-key" not in text + gateway.lines[0]

    asyncio.run(run())


def test_requests_without_a_key_have_few_lines_in_the_log_and_are_all_counted() -> None:
    """Anybody may send them without end; lines of those with a key are always written."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS, ADMIN)) as gateway:
            for _ in range(200):
                async with gateway.http.get(gateway.url + "/v1/models") as answer:
                    assert answer.status == 401
            async with gateway.http.get(gateway.url + "/metrics", headers=ALICE) as answer:
                text = await answer.text()
        assert 'gateway_requests_total{key="-",model="-",status="401"} 200.0' in text
        lines = [json.loads(line)["status"] for line in gateway.lines]
        assert lines[-1] == 200
        assert 10 <= lines.count(401) <= 100

    asyncio.run(run())


async def metrics_of(gateway: RunningGateway, query: str = "") -> str:
    """Return what `/metrics` shows an admin."""
    async with gateway.http.get(f"{gateway.url}/metrics{query}", headers=ALICE) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.text()


def test_metrics_show_what_used_pools_do_and_how_many_requests_they_hold() -> None:
    """From waking to failed or ready; a pool that nothing has asked for has no rows, and reading wakes nothing."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS, ADMIN)) as gateway:
            assert "gateway_pool_state{" not in await metrics_of(gateway)
            held = asyncio.create_task(gateway.post(ASK, headers=ALICE).__aenter__())
            await eventually(lambda: bool(gateway.pools and gateway.pools["tiny"].wakes))
            pool = gateway.pools["tiny"]
            text = await metrics_of(gateway)
            assert 'gateway_pool_state{gpu="H100",model="tiny",state="waking"} 1.0' in text
            assert 'gateway_pool_requests_held{gpu="H100",model="tiny"} 1.0' in text
            assert 'gateway_pool_dollars_per_hour{gpu="H100",model="tiny"} 3.95' in text
            assert re.search(r'gateway_pool_waking_seconds{gpu="H100",model="tiny"} 0\.\d*[1-9]', text)
            assert 'gpu="H100",model="other"' not in text
            assert 'gateway_cold_starts_total{model="other",outcome="failed"} 0.0' in text
            pool.fails = "CUDA out of memory."
            pool.may_wake.set()
            assert (await held).status == 503
            text = await metrics_of(gateway)
            assert 'gateway_pool_state{gpu="H100",model="tiny",state="failed"} 1.0' in text
            assert 'gateway_pool_state{gpu="H100",model="tiny",state="cold"} 0.0' in text
            assert 'gateway_pool_requests_held{gpu="H100",model="tiny"} 0.0' in text
            assert pool.wakes == 1

    asyncio.run(run())


def test_metrics_show_the_limits_of_keys_that_have_used_some() -> None:
    """Each with what is used of it."""

    async def run() -> None:
        limits = ADMIN | {"bob": KeyLimits(requests_per_minute=5, tokens_per_day=100)}
        async with (
            Engine(answers).serving() as engine,
            serve_gateway(ClientRegistry(KEYS, limits), url=engine.url) as gateway,
        ):
            assert 'key="bob"' not in await metrics_of(gateway)
            async with gateway.post(ASK, headers=BOB) as answer:
                assert answer.status == 200
            text = await metrics_of(gateway)
        assert 'gateway_key_limit{key="bob",limit="requests_per_minute"} 5.0' in text
        assert 'gateway_key_limit_used{key="bob",limit="requests_per_minute"} 1.0' in text
        assert 'gateway_key_limit_used{key="bob",limit="tokens_per_day"} 7.0' in text

    asyncio.run(run())


def test_scrapes_of_an_engines_metrics_are_in_no_time_and_not_in_the_ledger(tmp_path: Path) -> None:
    """Prometheus sends more of them than clients send requests."""

    async def run() -> None:
        ledger = Ledger(lambda: open_database(file=tmp_path / "usage.sqlite3"))
        async with (
            Engine(answers).serving() as engine,
            serve_gateway(ClientRegistry(KEYS, ADMIN), url=engine.url, ledger=ledger) as gateway,
        ):
            async with gateway.post(ASK, headers=ALICE) as answer:
                await answer.read()
            for _ in range(3):
                await metrics_of(gateway, "?model=tiny")
            text = await metrics_of(gateway)
        assert 'gateway_requests_total{key="alice",model="tiny",status="200"} 4.0' in text
        assert 'gateway_time_to_first_byte_seconds_count{model="tiny"} 1.0' in text
        assert 'gateway_request_duration_seconds_count{model="tiny"} 1.0' in text
        assert ledger.written == 1

    asyncio.run(run())


def test_metrics_of_an_engine_behind_modal_are_read_only_while_it_answers() -> None:
    """Any request to a container keeps it up, so a Prometheus that scrapes it all day would pay for a GPU."""

    async def run() -> None:
        engine = Engine(streams(b"data: 1\n\n", ends=False))
        async with engine.serving(), serve_gateway(ClientRegistry(KEYS, ADMIN), url=engine.url) as gateway:
            async with gateway.http.get(f"{gateway.url}/v1/models/tiny", headers=ALICE):
                gateway.pools["tiny"]._endpoint = Endpoint(engine.url, own_calls=CallRate())
            async with gateway.http.get(f"{gateway.url}/metrics?model=tiny", headers=ALICE) as answer:
                assert answer.status == 404
                assert "keeps its replica up" in (await answer.json())["error"]["message"]
            assert engine.requests == []
            async with gateway.post(ASK | {"stream": True}, headers=ALICE) as answer:
                await answer.content.readany()
                engine.behaviour = answers
                await metrics_of(gateway, "?model=tiny")

    asyncio.run(run())


def test_metrics_show_what_requests_cost_their_callers() -> None:
    """By key and model, as it is written to the ledger."""
    metrics = Metrics()
    for dollars in (0.25, None, 0.5):
        log = RequestLog("1", "POST", "/v1/chat/completions", key="alice", model="tiny", is_usage=True, dollars=dollars)
        metrics.begin(log)
        metrics.end(log)
    assert metrics.registry.get_sample_value("gateway_dollars_total", {"key": "alice", "model": "tiny"}) == 0.75


def test_documented_metrics_are_those_that_there_are(tmp_path: Path) -> None:
    """The table of docs/monitoring.md, and what the examples for Prometheus and Grafana ask for."""

    async def run() -> str:
        ledger = Ledger(lambda: open_database(file=tmp_path / "usage.sqlite3"))
        async with serve_gateway(ClientRegistry(KEYS, ADMIN), ledger=ledger) as gateway:
            return await metrics_of(gateway)

    shown = set(re.findall(r"^# TYPE (gateway_\w+)", asyncio.run(run()), re.M))
    shown = {name for name in shown if not name.endswith("_created")}
    day = {"gateway_day_dollars", "gateway_day_limit_dollars"}  # where SERVICE_MAX_DOLLARS_PER_DAY is set
    rows = re.findall(r"^\| (`gateway_.*?) \|", (ROOT / "docs/monitoring.md").read_text(), re.M)
    assert set(re.findall(r"gateway_\w+", " ".join(rows))) == shown | day
    for example in ("prometheus/rules.yml", "grafana/vllm-service.json"):
        asked = set(re.findall(r"\bgateway_\w+", (ROOT / "examples" / example).read_text()))
        assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in asked} <= shown | day
