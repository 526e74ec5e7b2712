"""Keys: how they are sent and compared, and what each may use."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time

import pytest

from service.errors import UsageError
from service.gateway.clients import ClientRegistry, load_clients
from service.gateway.key_set import load_limits
from service.keys import digest
from service.registry.models import Registry
from service.usage.limits import KeyLimits
from tests.gateway.upstream import (
    ALICE,
    ASK,
    BOB,
    KEYS,
    SPECS,
    Engine,
    RunningGateway,
    answers,
    eventually,
    serve_gateway,
    streams,
)

UNKNOWN = [{"Authorization": "Bearer stale"}, {"x-api-key": "stale"}, {"api-key": "stale"}]


def test_client_named_anonymous_that_has_a_key_is_no_admin() -> None:
    """Only the one client of a service without keys is; an older store may have a key of that name."""
    clients = ClientRegistry({digest(b"a-key"): "anonymous"})
    client = clients.authenticate([(b"x-api-key", b"a-key")])
    assert client is not None
    assert (client.name, client.is_anonymous, client.is_admin) == ("anonymous", False, False)
    everybody = ClientRegistry({}).authenticate([])
    assert everybody is not None
    assert (everybody.name, everybody.is_anonymous, everybody.is_admin) == ("anonymous", True, True)


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        (ALICE, "alice"),
        (BOB, "bob"),
        ({"authorization": "bearer  a-key"}, "alice"),
        ({"api-key": "a-key"}, "alice"),
        (UNKNOWN[0] | {"x-api-key": "b-key"}, "bob"),
        (UNKNOWN[0] | UNKNOWN[1] | {"api-key": "b-key"}, "bob"),
        (ALICE | UNKNOWN[1] | UNKNOWN[2], "alice"),
        ({"Authorization": "Basic eA==", "x-api-key": "b-key"}, "bob"),
        (ALICE | BOB, "alice"),
        ({"api-key": "a-key", "x-api-key": "b-key"}, "bob"),
    ],
)
def test_gateway_accepts_a_valid_key_in_every_header(headers: dict[str, str], name: str) -> None:
    """OpenAI's Bearer, Anthropic's x-api-key, Azure's api-key; a stale key beside it does no harm."""

    async def run() -> None:
        async with (
            Engine(answers).serving() as engine,
            serve_gateway(ClientRegistry(KEYS), url=engine.url) as gateway,
        ):
            async with gateway.post(ASK, headers=headers) as answer:
                assert answer.status == 200
            sent = engine.requests[0].headers
            assert not [key for key in ("a-key", "b-key", "stale") if key in str(sent)]
            assert json.loads(gateway.lines[0])["key"] == name

    asyncio.run(run())


def test_models_of_a_key_that_may_not_use_all_are_its_own() -> None:
    """It sees what it may use; `llm` only when that is one of them."""

    async def listed(gateway: RunningGateway, headers: dict[str, str]) -> list[str]:
        async with gateway.http.get(gateway.url + "/v1/models", headers=headers) as answer:
            return [entry["id"] for entry in (await answer.json())["data"]]

    async def run() -> None:
        clients = ClientRegistry(KEYS, models={"alice": frozenset({"other"})})
        async with serve_gateway(clients) as gateway:
            assert await listed(gateway, ALICE) == ["other"]
            assert await listed(gateway, BOB) == ["llm", "tiny", "other"]

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


def test_every_key_of_a_request_is_digested_before_it_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key itself is compared with anything, and the first valid one does not end the look-up."""
    digested: list[bytes] = []

    def noting(key: bytes) -> str:
        digested.append(key)
        return digest(key)

    monkeypatch.setattr("service.gateway.clients.digest", noting)
    client = ClientRegistry(KEYS).authenticate([(b"authorization", b"Bearer a-key"), (b"api-key", b"b-key")])

    assert client
    assert (client.name, digested) == ("alice", [b"b-key", b"a-key"])


def test_look_up_takes_as_long_for_ten_thousand_keys_as_for_one() -> None:
    """An anonymous request costs the same, however many keys there are."""

    def took_s(keys: int) -> float:
        clients = ClientRegistry({digest(str(number).encode()): f"k{number}" for number in range(keys)})
        times = []
        for _ in range(1000):
            began = time.perf_counter()
            assert clients.authenticate([(b"authorization", b"Bearer wrong")]) is None
            times.append(time.perf_counter() - began)
        return min(times)

    assert took_s(10_000) < 5 * took_s(1)


def test_key_that_is_empty_admits_nobody() -> None:
    """The digest of an empty file among the keys lets no request in that has no key."""
    nothing = hashlib.sha256(b"").hexdigest()

    assert ClientRegistry({nothing: "empty"}).authenticate([(b"x-api-key", b"")]) is None


def test_limits_of_a_minute_slide() -> None:
    """A request that was made a minute ago no longer counts."""
    times = [0.0]
    clients = ClientRegistry(KEYS, {"alice": KeyLimits(requests_per_minute=2)}, clock=lambda: times[-1])
    client = clients.authenticate([(b"authorization", b"Bearer a-key")])
    assert client
    for now in (0.0, 30.0, 60.1, 90.1):
        times.append(now)
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
