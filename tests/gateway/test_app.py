"""Who comes in, what a name means, what the door tells about itself, and what it counts."""

from __future__ import annotations

import asyncio
import hashlib
import json

import pytest

from service.errors import UsageError
from service.gateway.clients import KeyLimits, Keyring, load_keyring, load_limits
from service.gateway.router import Directory
from service.registry.models import Adapter, ModelSpec, Registry
from tests.gateway.upstream import SPECS, Engine, TestPool, answers, eventually, house, streams

ASK = {"model": "tiny", "messages": []}
KEYS = {hashlib.sha256(key.encode()).hexdigest(): name for key, name in (("a-key", "alice"), ("b-key", "bob"))}
ALICE, BOB = {"Authorization": "Bearer a-key"}, {"x-api-key": "b-key"}


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/chat/completions", "/v1/nope", "/"])
def test_door_without_a_key_opens_for_nobody_and_asks_how(path: str) -> None:
    """401 in OpenAI's shape, on whatever route."""

    async def run() -> None:
        async with house(Keyring(KEYS)) as door:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"x-api-key": ""}, {"Authorization": "Basic a-key"}):
                async with door.http.get(door.url + path, headers=headers) as answer:
                    assert answer.status == 401
                    assert answer.headers["WWW-Authenticate"] == "Bearer"
                    assert (await answer.json())["error"]["code"] == "invalid_api_key"

    asyncio.run(run())


def test_door_refuses_before_a_byte_of_the_body() -> None:
    """A stranger's upload is not taken."""

    async def run() -> None:
        async with house(Keyring(KEYS)) as door:
            host, port = door.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
            async with asyncio.timeout(2):
                assert b"401" in await reader.readline()
            writer.close()

    asyncio.run(run())


@pytest.mark.parametrize("headers", [ALICE, BOB, {"authorization": "bearer  a-key"}])
def test_door_opens_for_every_key_in_both_headers(headers: dict[str, str]) -> None:
    """Bearer, and Anthropic's own header."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, house(Keyring(KEYS), url=engine.url) as door:
            async with door.post(ASK, headers=headers) as answer:
                assert answer.status == 200
            sent = engine.requests[0].headers
            assert "a-key" not in str(sent)
            assert "b-key" not in str(sent)

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/health", "/docs", "/openapi.json"])
def test_door_tells_about_itself_without_a_key_and_wakes_nothing(path: str) -> None:
    """Whoever looks costs nothing."""

    async def run() -> None:
        async with house(Keyring(KEYS)) as door:
            async with door.http.get(door.url + path) as answer:
                assert answer.status == 200
                assert await answer.read()
            assert all(pool.wakes == 0 for pool in door.pools.values())

    asyncio.run(run())


def test_models_are_listed_with_their_state_and_none_is_woken() -> None:
    """GPU, context, price and state of every model."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, house(url=engine.url) as door:
            async with door.post(ASK) as answer:
                assert answer.status == 200
            async with door.http.get(door.url + "/v1/models") as answer:
                entries = {entry["id"]: entry for entry in (await answer.json())["data"]}
            states = {key: entry["state"] for key, entry in entries.items()}
            assert states == {"llm": "ready", "tiny": "ready", "other": "cold"}
            assert entries["other"]["gpu"] == "H100"
            assert entries["other"]["dollars_per_hour"] == 3.95
            assert door.pools["other"].wakes == 0

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
def test_name_means_a_pool_and_the_engine_is_told_one_that_it_knows(name: str | None, key: str, told: str) -> None:
    """Key, alias, hub id in any case, `llm`, with a GPU, with `-local`, none at all."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, house(url=engine.url) as door:
            async with door.post({"messages": []} | ({"model": name} if name else {})) as answer:
                assert answer.status == 200
            assert json.loads(engine.requests[0].body)["model"] == told
            assert door.pools[key].wakes == 1

    asyncio.run(run())


def test_name_that_nobody_has_is_answered_with_the_nearest() -> None:
    """404 `model_not_found`; nothing is woken."""

    async def run() -> None:
        async with house() as door, door.post({"model": "tinny", "messages": []}) as answer:
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
    """Seeds' clients rely on it; what the request sets itself stays."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, house(url=engine.url) as door:
            async with door.post({"model": "tiny-local", **given}) as answer:
                assert answer.status == 200
            assert json.loads(engine.requests[0].body) == {"model": "tiny", **given, **added}

    asyncio.run(run())


def test_limits_of_a_key_are_counted() -> None:
    """Models, requests a minute, requests at once: each with its own answer, and for that key alone."""
    limits = {"alice": KeyLimits(requests_per_minute=3, concurrency=1)}
    ring = Keyring(KEYS, limits, {"bob": frozenset({"other"})})

    async def run() -> None:
        async with (
            Engine(streams(b"data: {}\n\n", ends=False)).serving() as engine,
            house(ring, url=engine.url) as door,
        ):
            async with door.post(ASK | {"stream": True}, headers=ALICE) as running:
                assert running.status == 200
                async with door.post(ASK, headers=ALICE) as answer:
                    assert answer.status == 429
                    assert answer.headers["Retry-After"] == "1"
            await eventually(lambda: engine.running == 0)
            engine.behaviour = answers
            for status in (200, 200, 429):
                async with door.post(ASK, headers=ALICE) as answer:
                    assert answer.status == status
            assert 1 <= int(answer.headers["Retry-After"]) <= 61
            async with door.post(ASK, headers=BOB) as answer:
                assert answer.status == 403
                assert (await answer.json())["error"]["code"] == "model_not_allowed"
            async with door.post(ASK | {"model": "other"}, headers=BOB) as answer:
                assert answer.status == 200

    asyncio.run(run())


def test_limits_of_a_minute_slide() -> None:
    """What was a minute ago no longer counts."""
    times = iter((0.0, 30.0, 60.1, 90.1))
    ring = Keyring(KEYS, {"alice": KeyLimits(requests_per_minute=2)}, clock=lambda: next(times))
    client = ring.find([(b"authorization", b"Bearer a-key")])
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
        ('{"alice": {"models": ["tiny-h200"]}}', "on whatever GPU. Write 'tiny'"),
    ],
)
def test_limits_that_are_wrong_are_refused_in_words(text: str, match: str) -> None:
    """A limit that nobody applies is worse than none."""
    with pytest.raises(UsageError, match=match):
        load_keyring({"API_LIMITS": text}, KEYS, Registry(SPECS), "tiny")


def test_limits_unset_are_none() -> None:
    """Every key may do all."""
    assert load_limits({}, ["alice"]) == {}


@pytest.mark.parametrize(
    ("path", "size", "status"), [("/tokenize", 2**20 + 1, 413), ("/v1/completions", 2**25 + 1, 413)]
)
def test_body_over_the_limit_is_refused(path: str, size: int, status: int) -> None:
    """By what it declares, before it is read; and by what comes, where it declares nothing."""

    async def pieces():  # type: ignore[no-untyped-def]
        for _ in range(size // 65536 + 1):
            yield b" " * 65536

    async def run() -> None:
        async with house() as door:
            headers = {"Content-Length": str(size)}
            async with door.http.post(door.url + path, headers=headers, data=pieces()) as answer:
                assert answer.status == status
            async with door.http.post(door.url + path, data=pieces()) as answer:
                assert answer.status == status

    asyncio.run(run())


def test_metrics_and_access_line_tell_who_what_and_how_much() -> None:
    """Neither holds a key or content."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, house(Keyring(KEYS), url=engine.url) as door:
            async with door.post(ASK | {"user": "s3cret"}, headers=ALICE) as answer:
                assert answer.status == 200
            async with door.http.get(door.url + "/metrics", headers=ALICE) as answer:
                text = await answer.text()
        assert 'gateway_requests_total{key="alice",model="tiny",status="200"} 1.0' in text
        assert 'gateway_tokens_total{key="alice",kind="completion",model="tiny"} 4.0' in text
        assert 'gateway_cold_starts_total{model="tiny",outcome="ready"} 1.0' in text
        line = json.loads(door.lines[0])
        assert (line["key"], line["model"], line["status"], line["prompt_tokens"]) == ("alice", "tiny", 200, 3)
        assert "s3cret" not in text + door.lines[0]
        assert "a-key" not in text + door.lines[0]

    asyncio.run(run())


def test_request_id_that_is_no_id_is_replaced() -> None:
    """What goes into logs is printable and short."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, house(url=engine.url) as door:
            async with door.post(ASK, headers={"X-Request-Id": "x" * 129}) as answer:
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
    """An empty body, and what only an engine that runs could answer."""

    async def run() -> None:
        async with house() as door:
            async with door.http.request(method, door.url + path) as answer:
                assert answer.status == status
                assert method == "HEAD" or "error" in await answer.json()
            assert all(pool.wakes == 0 for pool in door.pools.values())

    asyncio.run(run())


def test_adapter_on_a_gpu_is_that_adapter() -> None:
    """A GPU behind its name changes where it runs, not what it is."""
    spec = ModelSpec(key="base", path="x", adapters=(Adapter(name="SQL", path="y"),))
    directory = Directory(Registry({"base": spec}), "base", lambda spec, _: TestPool(spec))

    assert [directory.find(name).name for name in ("sql", "sql-h200", "SQL-h200-local")] == ["SQL", "SQL", "SQL"]
    assert directory.find("base-h200").name == "base"


def test_websocket_is_turned_away() -> None:
    """There are none here."""

    async def run() -> None:
        async with (
            house() as door,
            door.http.get(
                door.url + "/v1/chat/completions", headers={"Upgrade": "websocket", "Connection": "Upgrade"}
            ) as answer,
        ):
            assert answer.status in {400, 403, 404, 405, 426}

    asyncio.run(run())
