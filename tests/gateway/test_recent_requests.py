"""`GET /v1/requests`: what runs and what ended, metadata alone, by key, in pages of bounded size and memory."""

from __future__ import annotations

import asyncio
import gc
import json
import time
import tracemalloc
from types import SimpleNamespace
from typing import Any

import pytest

from service.gateway.api_client import ApiClient
from service.gateway.clients import ClientRegistry
from service.gateway.metrics import RequestLog
from service.gateway.recent_requests import PAGE_BYTES, RecentRequests
from service.in_engine.vllm_service.usage_report import EngineUsage
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

ADMIN = ApiClient("root", KeyLimits(admin=True))


def ended(number: int, key: str = "alice", model: str = "m" * 40) -> RequestLog:
    """Return the log of a request that has ended."""
    log = RequestLog(f"{number:032x}", "POST", "/v1/chat/completions", key=key, model=model, pool="H100", status=200)
    log.is_usage, log.usage, log.replica = True, EngineUsage(1000, 900, 200, 1.25), "1m8kb9kx44qhn"
    log.cost = log.dollars = 0.0012345678
    log.first_byte_s, log.tail, log.head = 0.1234567, b"secret answer", b"secret answer"
    return log


def ask(recent: RecentRequests, client: ApiClient = ADMIN, **query: object) -> Any:
    """Return the answer to a query."""
    request = SimpleNamespace(
        state=SimpleNamespace(client=client), query_params={name: str(value) for name, value in query.items()}
    )
    return json.loads(recent.answer(request))  # type: ignore[arg-type]


async def rows(gateway: RunningGateway, headers: dict[str, str], query: str = "") -> Any:
    """Return the answer of a gateway."""
    async with gateway.http.get(f"{gateway.url}/v1/requests{query}", headers=headers) as answer:
        assert answer.status == 200
        return await answer.json()


def objects(answer: Any) -> list[dict[str, Any]]:
    """Return the rows with names."""
    return [dict(zip(answer["columns"], row, strict=True)) for row in answer["data"]]


def test_requests_of_a_key_are_seen_by_it_and_by_admins() -> None:
    """Status, tokens and model of an answer, and of an error; another key sees neither."""

    async def run() -> None:
        clients = ClientRegistry(KEYS, {"bob": KeyLimits(admin=True)})
        async with Engine(answers).serving() as engine, serve_gateway(clients, url=engine.url) as gateway:
            async with gateway.post(ASK, headers=ALICE) as answer:
                name = answer.headers["x-request-id"]
            async with gateway.post({"model": "nope"}, headers=BOB) as answer:
                assert answer.status == 404
            (own,) = objects(await rows(gateway, ALICE))
            assert (own["id"], own["key"], own["model"], own["status"]) == (name, "alice", "tiny", 200)
            assert (own["tokens_in"], own["tokens_out"]) == (3, 4)
            both = objects(await rows(gateway, BOB))
            assert [(one["key"], one["status"], one["code"]) for one in both] == [
                ("bob", 404, "model_not_found"),
                ("alice", 200, None),
            ]
            assert objects(await rows(gateway, BOB, f"?id={name}"))[0]["number"] == own["number"]

    asyncio.run(run())


def test_requests_that_run_are_listed_until_they_end() -> None:
    """A stream in flight is there with what it has sent."""

    async def run() -> None:
        clients = ClientRegistry(KEYS)
        engine = Engine(streams(b"data: 1\n\n", ends=False))
        async with engine.serving(), serve_gateway(clients, url=engine.url) as gateway:
            async with gateway.post(ASK | {"stream": True}, headers=ALICE) as answer:
                await answer.content.readany()
                running = (await rows(gateway, ALICE))["running"]
                (row,) = [dict(zip(running["columns"], row, strict=True)) for row in running["data"]]
                assert (row["key"], row["model"], row["stream"]) == ("alice", "tiny", True)
                assert row["bytes_out"] == 9
                assert (await rows(gateway, BOB))["running"]["count"] == 0
            await eventually(lambda: engine.running == 0)
            found = await rows(gateway, ALICE)
            assert found["running"]["count"] == 0
            assert objects(found)[0]["client_left"] is True

    asyncio.run(run())


def test_requests_that_only_read_the_service_are_not_kept() -> None:
    """A console that is open all day would push out all others."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS)) as gateway:
            for path in ("/v1/models", "/v1/requests", "/v1/key", "/nope", "/health", "/metrics?model=tiny"):
                async with gateway.http.get(gateway.url + path, headers=ALICE) as answer:
                    await answer.read()
            assert (await rows(gateway, ALICE))["data"] == []

    asyncio.run(run())


def test_requests_hold_no_content() -> None:
    """Neither prompt nor answer, though the log keeps the end of an answer to find its tokens there."""
    recent = RecentRequests()
    log = ended(1)
    recent.begin(log)
    assert "secret" not in json.dumps(ask(recent))
    recent.end(log, (1000, 200))
    assert "secret" not in json.dumps(ask(recent))
    assert not [one for one in gc.get_referrers(log) if isinstance(one, dict) and id(log) in one]


def test_requests_page_to_the_oldest_and_from_the_newest_seen() -> None:
    """`before` goes back, `after` brings what is new; no row comes twice or is left out."""
    recent = RecentRequests()
    for number in range(500):
        recent.end(ended(number), None)
    page = ask(recent, limit=200)
    seen = [one["number"] for one in objects(page)]
    while page["more"]:
        page = ask(recent, limit=200, before=seen[-1])
        seen += [one["number"] for one in objects(page)]
    assert seen == [*range(500, 0, -1)]
    assert page["last"] == 500
    recent.end(ended(500), None)
    assert [one["number"] for one in objects(ask(recent, after=500))] == [501]


def test_requests_of_10_000_are_answered_in_100_kb_and_50_ms() -> None:
    """However long the names are and whatever is asked for; the last 1,000 are kept, in less than 1 MiB."""
    recent = RecentRequests()
    tracemalloc.start()
    for number in range(10_000):
        recent.end(ended(number, key=f"key-{number}"), (1000, 200))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept <= 2**20
    for number in range(1000):
        recent.begin(ended(number, key="k" * 64))
    request = SimpleNamespace(state=SimpleNamespace(client=ADMIN), query_params={"limit": "1000"})
    began = time.process_time()
    body = recent.answer(request)  # type: ignore[arg-type]
    assert time.process_time() - began <= 0.05
    assert PAGE_BYTES // 2 <= len(body) <= 100_000
    assert json.loads(body)["more"] is True


@pytest.mark.parametrize("query", ["limit=x", "before=-1", "after=1e9", "limit=" + "9" * 40, "before=%d9%a1"])
def test_requests_wrong_number_is_400(query: str) -> None:
    """The error names the field."""

    async def run() -> None:
        async with (
            serve_gateway(ClientRegistry(KEYS)) as gateway,
            gateway.http.get(f"{gateway.url}/v1/requests?{query}", headers=ALICE) as answer,
        ):
            assert answer.status == 400
            assert (await answer.json())["error"]["param"] == query.partition("=")[0]

    asyncio.run(run())
