"""Authentication, model names, what the gateway answers itself, and what it counts."""

from __future__ import annotations

import asyncio
import hashlib
import json

import pytest

from service.errors import UsageError
from service.gateway.clients import ClientRegistry, KeyLimits, load_clients, load_limits
from service.gateway.router import ModelRouter
from service.registry.models import Adapter, ModelSpec, Registry
from tests.gateway.upstream import SPECS, Engine, TestPool, answers, eventually, serve_gateway, streams

ASK = {"model": "tiny", "messages": []}
KEYS = {hashlib.sha256(key.encode()).hexdigest(): name for key, name in (("a-key", "alice"), ("b-key", "bob"))}
ALICE, BOB = {"Authorization": "Bearer a-key"}, {"x-api-key": "b-key"}


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/chat/completions", "/v1/nope", "/"])
def test_gateway_without_a_key_is_401_on_every_route(path: str) -> None:
    """The error has OpenAI's shape and says how to send a key."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS)) as gateway:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"x-api-key": ""}, {"Authorization": "Basic a-key"}):
                async with gateway.http.get(gateway.url + path, headers=headers) as answer:
                    assert answer.status == 401
                    assert answer.headers["WWW-Authenticate"] == "Bearer"
                    assert (await answer.json())["error"]["code"] == "invalid_api_key"

    asyncio.run(run())


def test_gateway_refuses_a_request_without_a_key_before_its_body() -> None:
    """The body of an unauthenticated request is not read."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS)) as gateway:
            host, port = gateway.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
            async with asyncio.timeout(2):
                assert b"401" in await reader.readline()
            writer.close()

    asyncio.run(run())


@pytest.mark.parametrize("headers", [ALICE, BOB, {"authorization": "bearer  a-key"}])
def test_gateway_accepts_every_key_in_both_headers(headers: dict[str, str]) -> None:
    """OpenAI's Bearer header, and Anthropic's own."""

    async def run() -> None:
        async with (
            Engine(answers).serving() as engine,
            serve_gateway(ClientRegistry(KEYS), url=engine.url) as gateway,
        ):
            async with gateway.post(ASK, headers=headers) as answer:
                assert answer.status == 200
            sent = engine.requests[0].headers
            assert "a-key" not in str(sent)
            assert "b-key" not in str(sent)

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/health", "/docs", "/openapi.json"])
def test_gateway_open_routes_need_no_key_and_wake_nothing(path: str) -> None:
    """A request to them costs nothing."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS)) as gateway:
            async with gateway.http.get(gateway.url + path) as answer:
                assert answer.status == 200
                assert await answer.read()
            assert all(pool.wakes == 0 for pool in gateway.pools.values())

    asyncio.run(run())


def test_models_are_listed_with_their_state_and_none_is_woken() -> None:
    """GPU, context, price and state of every model."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            async with gateway.post(ASK) as answer:
                assert answer.status == 200
            async with gateway.http.get(gateway.url + "/v1/models") as answer:
                entries = {entry["id"]: entry for entry in (await answer.json())["data"]}
            states = {key: entry["state"] for key, entry in entries.items()}
            assert states == {"llm": "ready", "tiny": "ready", "other": "cold"}
            assert entries["other"]["gpu"] == "H100"
            assert entries["other"]["dollars_per_hour"] == 3.95
            assert gateway.pools["other"].wakes == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "key", "told"),
    [
        ("tiny", "tiny", "tiny"),
        ("small", "tiny", "small"),
        ("llm", "tiny", "tiny"),
        ("Org/Other-1B", "other", "Org/Other-1B"),
        ("org/OTHER-1b", "other", "other"),
        ("other-h200", "other H200", "other"),
        ("tiny-local", "tiny", "tiny"),
        ("other-h200-local", "other H200", "other"),
        (None, "tiny", "tiny"),
    ],
)
def test_name_selects_a_pool_and_the_engine_gets_a_name_that_it_knows(name: str | None, key: str, told: str) -> None:
    """Key, alias, hub id in any case, `llm`, with a GPU, with `-local`, none at all."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            async with gateway.post({"messages": []} | ({"model": name} if name else {})) as answer:
                assert answer.status == 200
            assert json.loads(engine.requests[0].body)["model"] == told
            assert gateway.pools[key].wakes == 1

    asyncio.run(run())


def test_name_that_is_unknown_is_answered_with_the_nearest() -> None:
    """404 `model_not_found`; nothing is woken."""

    async def run() -> None:
        async with serve_gateway() as gateway, gateway.post({"model": "tinny", "messages": []}) as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["code"], error["param"]) == (404, "model_not_found", "model")
            assert "Did you mean 'tiny'?" in error["message"]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({"tools": [{}]}, {"temperature": 0.3, "tool_choice": "auto"}),
        ({"tools": [{}], "temperature": 1}, {"temperature": 1, "tool_choice": "auto"}),
        ({"tools": [{}], "tool_choice": "none"}, {"temperature": 0.3, "tool_choice": "none"}),
        ({}, {}),
    ],
)
def test_name_with_local_fills_in_defaults_for_tools(given: dict[str, object], added: dict[str, object]) -> None:
    """Clients of the seeds rely on it; fields that the request sets itself stay."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            async with gateway.post({"model": "tiny-local", **given}) as answer:
                assert answer.status == 200
            assert json.loads(engine.requests[0].body) == {"model": "tiny", **given, **added}

    asyncio.run(run())


def test_limits_of_a_key_are_counted() -> None:
    """Models, requests per minute, concurrent requests: each has its own error, and counts for that key alone."""
    limits = {"alice": KeyLimits(requests_per_minute=3, concurrency=1)}
    clients = ClientRegistry(KEYS, limits, {"bob": frozenset({"other"})})

    async def run() -> None:
        async with (
            Engine(streams(b"data: {}\n\n", ends=False)).serving() as engine,
            serve_gateway(clients, url=engine.url) as gateway,
        ):
            async with gateway.post(ASK | {"stream": True}, headers=ALICE) as running:
                assert running.status == 200
                async with gateway.post(ASK, headers=ALICE) as answer:
                    assert answer.status == 429
                    assert answer.headers["Retry-After"] == "1"
            await eventually(lambda: engine.running == 0)
            engine.behaviour = answers
            for status in (200, 200, 429):
                async with gateway.post(ASK, headers=ALICE) as answer:
                    assert answer.status == status
            assert 1 <= int(answer.headers["Retry-After"]) <= 61
            async with gateway.post(ASK, headers=BOB) as answer:
                assert answer.status == 403
                assert (await answer.json())["error"]["code"] == "model_not_allowed"
            async with gateway.post(ASK | {"model": "other"}, headers=BOB) as answer:
                assert answer.status == 200

    asyncio.run(run())


def test_limits_of_a_minute_slide() -> None:
    """A request that was made a minute ago no longer counts."""
    times = iter((0.0, 30.0, 60.1, 90.1))
    clients = ClientRegistry(KEYS, {"alice": KeyLimits(requests_per_minute=2)}, clock=lambda: next(times))
    client = clients.authenticate([(b"authorization", b"Bearer a-key")])
    assert client
    for _ in range(4):
        with client.request():
            pass


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[]", "not a JSON object"),
        ("{", "not a JSON object"),
        ('{"alice": {"rpm": 1}}', "field 'rpm'"),
        ('{"alice": {"concurrency": 0}}', "field 'concurrency' is 0"),
        ('{"alcie": {}}', "Did you mean 'alice'"),
        ('{"alice": {"models": ["tinny"]}}', "API_LIMITS of 'alice'.*Did you mean 'tiny'"),
        ('{"alice": {"models": ["tiny-h200"]}}', "allowed on every GPU. Write 'tiny'"),
    ],
)
def test_limits_that_are_wrong_are_refused(text: str, match: str) -> None:
    """The error says what is wrong: a limit that does not apply is worse than none."""
    with pytest.raises(UsageError, match=match):
        load_clients({"API_LIMITS": text}, KEYS, Registry(SPECS), "tiny")


def test_limits_unset_are_none() -> None:
    """Without API_LIMITS every key may use everything."""
    assert load_limits({}, ["alice"]) == {}


@pytest.mark.parametrize(
    ("path", "size", "status"), [("/tokenize", 2**20 + 1, 413), ("/v1/completions", 2**25 + 1, 413)]
)
def test_body_over_the_limit_is_refused(path: str, size: int, status: int) -> None:
    """By its declared length before it is read, or while it arrives where it declares none."""

    async def pieces():  # type: ignore[no-untyped-def]
        for _ in range(size // 65536 + 1):
            yield b" " * 65536

    async def run() -> None:
        async with serve_gateway() as gateway:
            headers = {"Content-Length": str(size)}
            async with gateway.http.post(gateway.url + path, headers=headers, data=pieces()) as answer:
                assert answer.status == status
            async with gateway.http.post(gateway.url + path, data=pieces()) as answer:
                assert answer.status == status

    asyncio.run(run())


def test_metrics_and_request_log_have_client_model_and_amounts() -> None:
    """Neither holds a key or content."""

    async def run() -> None:
        async with (
            Engine(answers).serving() as engine,
            serve_gateway(ClientRegistry(KEYS), url=engine.url) as gateway,
        ):
            async with gateway.post(ASK | {"user": "s3cret"}, headers=ALICE) as answer:
                assert answer.status == 200
            async with gateway.http.get(gateway.url + "/metrics", headers=ALICE) as answer:
                text = await answer.text()
        assert 'gateway_requests_total{key="alice",model="tiny",status="200"} 1.0' in text
        assert 'gateway_tokens_total{key="alice",kind="completion",model="tiny"} 4.0' in text
        assert 'gateway_cold_starts_total{model="tiny",outcome="ready"} 1.0' in text
        line = json.loads(gateway.lines[0])
        assert (line["key"], line["model"], line["status"], line["prompt_tokens"]) == ("alice", "tiny", 200, 3)
        assert "s3cret" not in text + gateway.lines[0]
        assert "a-key" not in text + gateway.lines[0]

    asyncio.run(run())


def test_request_id_that_is_invalid_is_replaced() -> None:
    """An id that is written to logs is printable and short."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            async with gateway.post(ASK, headers={"X-Request-Id": "x" * 129}) as answer:
                assert len(answer.headers["x-request-id"]) == 32
            assert engine.requests[0].headers["x-request-id"] == answer.headers["x-request-id"]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/chat/completions", 400),
        ("POST", "/v1/responses/resp_1/cancel", 404),
        ("POST", "/v1/responses/resp_1", 405),
        ("HEAD", "/v1/responses/resp_1", 405),
        ("GET", "/v1/responses/resp_1", 404),
        ("GET", "/metrics?model=tiny", 404),
        ("GET", "/v1/responses/%C3%A9", 404),
        ("GET", "/v1/chat/completions/", 404),
    ],
)
def test_request_that_needs_no_engine_wakes_none(method: str, path: str, status: int) -> None:
    """An empty body, and routes that only a running engine can answer."""

    async def run() -> None:
        async with serve_gateway() as gateway:
            async with gateway.http.request(method, gateway.url + path) as answer:
                assert answer.status == status
                assert method == "HEAD" or "error" in await answer.json()
            assert all(pool.wakes == 0 for pool in gateway.pools.values())

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "allow"), [("/v1/models", "GET, HEAD"), ("/health", "GET, HEAD"), ("/v1/responses/resp_1", "GET")]
)
def test_method_that_is_not_allowed_is_405_with_those_that_are(path: str, allow: str) -> None:
    """HEAD works where the gateway answers itself, and is forwarded to no engine."""

    async def run() -> None:
        async with serve_gateway() as gateway:
            async with gateway.http.delete(gateway.url + path) as answer:
                assert (answer.status, answer.headers["Allow"]) == (405, allow)
            async with gateway.http.head(gateway.url + path) as answer:
                assert answer.status == (200 if "HEAD" in allow else 405)

    asyncio.run(run())


def test_adapter_on_a_gpu_is_that_adapter() -> None:
    """A GPU after its name changes where it runs, not which adapter it is."""
    spec = ModelSpec(key="base", path="x", adapters=(Adapter(name="SQL", path="y"),))
    router = ModelRouter(Registry({"base": spec}), "base", lambda spec, _: TestPool(spec))

    assert [router.find(name).name for name in ("sql", "sql-h200", "SQL-h200-local")] == ["SQL", "SQL", "SQL"]
    assert router.find("base-h200").name == "base"


def test_websocket_is_refused() -> None:
    """The API has no websockets."""

    async def run() -> None:
        async with (
            serve_gateway() as gateway,
            gateway.http.get(
                gateway.url + "/v1/chat/completions", headers={"Upgrade": "websocket", "Connection": "Upgrade"}
            ) as answer,
        ):
            assert answer.status in {400, 403, 404, 405, 426}

    asyncio.run(run())
