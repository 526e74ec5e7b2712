"""Another model answers while the wanted one's pool is cold, failed or full: when it may, and what is woken."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from service.gateway import fallback
from service.gateway.clients import ClientRegistry
from service.registry.models import ModelSpec, Registry
from tests.gateway.upstream import (
    Behaviour,
    Engine,
    Request,
    RunningGateway,
    answers,
    eventually,
    serve_gateway,
    streams,
)

REGISTRY = Registry(
    {
        "tiny": ModelSpec(key="tiny", path="tiny"),
        "second": ModelSpec(key="second", path="second"),
        "big": ModelSpec(key="big", path="big", fallback=("tiny", "second")),
        "eager": ModelSpec(key="eager", path="eager", fallback=("tiny",), fallback_default="allow"),
    }
)
ALLOW, DENY = {"X-Fallback": "allow"}, {"x-fallback": "Deny"}
BIG = {"model": "big", "messages": []}
STATUSES = {429: "Too Many Requests", 503: "Service Unavailable", 400: "Bad Request", 500: "Internal Server Error"}


def refuses(status: int) -> Behaviour:
    """Return what answers every request with an error."""

    async def behave(_: Request, writer: asyncio.StreamWriter) -> None:
        body = json.dumps({"error": {"message": f"refused with {status}", "type": "x", "code": status}}).encode()
        head = f"HTTP/1.1 {status} {STATUSES[status]}\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()

    return behave


@asynccontextmanager
async def serving(
    monkeypatch: pytest.MonkeyPatch,
    *ready: str,
    big: Behaviour = answers,
    small: Behaviour = answers,
    clients: ClientRegistry | None = None,
    hold_s: float = 60.0,
    comment_interval_s: float = 60.0,
) -> AsyncIterator[tuple[RunningGateway, Engine, Engine]]:
    """Serve the models of which these are ready; the others wake when the test lets them."""
    monkeypatch.setattr(fallback, "GRACE_S", 0.2)
    async with (
        Engine(big).serving() as own,
        Engine(small).serving() as others,
        serve_gateway(clients, registry=REGISTRY, hold_s=hold_s, comment_interval_s=comment_interval_s) as gateway,
    ):
        async with gateway.http.get(gateway.url + "/v1/models", headers={"x-api-key": "all"}):
            pass
        for key, pool in gateway.pools.items():
            pool.url = own.url if key == "big" else others.url
            if key in ready:
                pool.may_wake.set()
                await pool.ready()
        yield gateway, own, others


def woken(gateway: RunningGateway) -> dict[str, int]:
    """Return how often each pool was woken."""
    return {key: pool.wakes for key, pool in gateway.pools.items() if pool.wakes}


async def ask(gateway: RunningGateway) -> tuple[int, str | None]:
    """Ask the big model, and return the status and who answered in its place."""
    async with gateway.post(BIG, headers=ALLOW) as answer:
        return answer.status, answer.headers.get("X-Served-Model")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_cold_pool_has_its_fallback_answer_and_is_woken(
    monkeypatch: pytest.MonkeyPatch, path: str, stream: bool
) -> None:
    """The header says who answered, the engine is sent a name that it knows, and the next request gets its model."""
    small = streams(b"data: 1\n\n", b"data: [DONE]\n\n") if stream else answers

    async def run() -> None:
        async with serving(monkeypatch, "tiny", small=small) as (gateway, _, others):
            async with gateway.post({**BIG, "stream": stream}, path, headers=ALLOW) as answer:
                assert (answer.status, answer.headers["X-Served-Model"]) == (200, "tiny")
                assert await answer.read()
            assert json.loads(others.requests[0].body)["model"] == "tiny"
            assert woken(gateway) == {"tiny": 1, "big": 1}
            line = json.loads(gateway.lines[-1])
            assert (line["model"], line["fallback_for"], line["status"]) == ("tiny", "big", 200)
            gateway.pools["big"].may_wake.set()
            await eventually(lambda: gateway.pools["big"].state == "ready")
            async with gateway.post(BIG, headers=ALLOW) as answer:
                assert (answer.status, "X-Served-Model" in answer.headers) == (200, False)
            assert json.loads(gateway.lines[-1])["fallback_for"] is None

    asyncio.run(run())


def test_pool_that_is_ready_within_the_grace_answers_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Modal a pool that was not asked for half a minute only has to be asked."""

    async def run() -> None:
        async with serving(monkeypatch, "tiny") as (gateway, own, _):
            gateway.pools["big"].may_wake.set()
            async with gateway.post(BIG, headers=ALLOW) as answer:
                assert (answer.status, "X-Served-Model" in answer.headers) == (200, False)
            assert len(own.requests) == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("model", "headers", "may"),
    [("big", {}, False), ("big", DENY, False), ("big", ALLOW, True), ("eager", {}, True), ("eager", DENY, False)],
)
def test_request_decides_and_else_the_entry(
    monkeypatch: pytest.MonkeyPatch, model: str, headers: dict[str, str], may: bool
) -> None:
    """Without permission the request waits for its model as ever."""

    async def run() -> None:
        async with (
            serving(monkeypatch, "tiny", hold_s=0.3) as (gateway, _, _others),
            gateway.post({"model": model, "messages": []}, headers=headers) as answer,
        ):
            assert answer.headers.get("X-Served-Model") == ("tiny" if may else None)
            assert answer.status == (200 if may else 503)

    asyncio.run(run())


def test_header_with_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typo must not silently mean no."""

    async def run() -> None:
        async with serving(monkeypatch, "tiny") as (gateway, _, _others):
            async with gateway.post(BIG, headers={"X-Fallback": "yes"}) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (400, "invalid_header")
            assert woken(gateway) == {"tiny": 1}

    asyncio.run(run())


@pytest.mark.parametrize(("ready", "served"), [(("second",), "second"), (("tiny", "second"), "tiny")])
def test_first_fallback_that_is_ready_answers(
    monkeypatch: pytest.MonkeyPatch, ready: tuple[str, ...], served: str
) -> None:
    """One that is cold is passed over, and not woken."""

    async def run() -> None:
        async with serving(monkeypatch, *ready) as (gateway, _, _others):
            async with gateway.post(BIG, headers=ALLOW) as answer:
                assert answer.headers["X-Served-Model"] == served
            assert set(woken(gateway)) == {*ready, "big"}

    asyncio.run(run())


def test_request_whose_fallbacks_are_cold_too_waits_for_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without fallbacks; only the wanted pool is woken."""

    async def run() -> None:
        async with serving(monkeypatch) as (gateway, own, _):
            asked = asyncio.ensure_future(ask(gateway))
            await eventually(lambda: woken(gateway) == {"big": 1})
            await asyncio.sleep(0.3)
            gateway.pools["big"].may_wake.set()
            assert await asked == (200, None)
            assert len(own.requests) == 1
            assert woken(gateway) == {"big": 1}

    asyncio.run(run())


def test_stream_that_waits_with_comments_reaches_its_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comment ends the search for another model; the body is kept until the engine has it."""
    big = streams(b"data: 1\n\n", b"data: [DONE]\n\n")

    async def run() -> None:
        async with serving(monkeypatch, big=big, comment_interval_s=0.1) as (gateway, own, _):
            async with gateway.post({**BIG, "stream": True}, headers=ALLOW) as answer:
                assert (await answer.content.readline()).startswith(b": ")
                gateway.pools["big"].may_wake.set()
                assert b"data: 1\n\n" in await answer.read()
            assert json.loads(own.requests[0].body) == {**BIG, "stream": True}

    asyncio.run(run())


def test_pool_that_failed_has_its_fallback_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and within the seconds in which it is not woken again."""

    async def run() -> None:
        async with serving(monkeypatch, "tiny") as (gateway, _, _others):
            gateway.pools["big"].fails = "the disk is full"
            gateway.pools["big"].may_wake.set()
            for _ in range(2):
                async with gateway.post(BIG, headers=ALLOW) as answer:
                    assert (answer.status, answer.headers["X-Served-Model"]) == (200, "tiny")
            assert gateway.pools["big"].wakes == 1

    asyncio.run(run())


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("stream", [False, True])
def test_pool_that_says_it_is_full_has_its_fallback_answer(
    monkeypatch: pytest.MonkeyPatch, status: int, stream: bool
) -> None:
    """The engine's queue, or Modal's limit of calls."""

    async def run() -> None:
        async with serving(monkeypatch, "big", "tiny", big=refuses(status)) as (gateway, own, others):
            async with gateway.post({**BIG, "stream": stream}, headers=ALLOW) as answer:
                assert (answer.status, answer.headers["X-Served-Model"]) == (200, "tiny")
            assert (len(own.requests), len(others.requests)) == (1, 1)

    asyncio.run(run())


def test_pool_whose_replicas_are_all_busy_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request would wait in Modal's queue; without a fallback that is ready it does."""

    async def run() -> None:
        async with serving(monkeypatch, "big", "tiny") as (gateway, own, _):
            gateway.pools["big"].full = True
            async with gateway.post(BIG, headers=ALLOW) as answer:
                assert answer.headers["X-Served-Model"] == "tiny"
            gateway.pools["tiny"].mark_unreachable()
            async with gateway.post(BIG, headers=ALLOW) as answer:
                assert (answer.status, "X-Served-Model" in answer.headers) == (200, False)
            assert len(own.requests) == 1

    asyncio.run(run())


@pytest.mark.parametrize("status", [400, 500])
def test_error_of_the_wanted_model_that_is_no_shortage_is_the_answer(
    monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """A wrong request is wrong for every model, and what broke one engine must not be sent to the next."""

    async def run() -> None:
        async with serving(monkeypatch, "big", "tiny", big=refuses(status)) as (gateway, _, others):
            async with gateway.post(BIG, headers=ALLOW) as answer:
                assert answer.status == (400 if status == 400 else 502)
            assert others.requests == []

    asyncio.run(run())


@pytest.mark.parametrize("status", [400, 503])
def test_error_of_a_fallback_is_not_the_answer(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """Its context may be too short: the request then waits for the model that it named."""

    async def run() -> None:
        async with serving(monkeypatch, "tiny", small=refuses(status)) as (gateway, own, others):
            asked = asyncio.ensure_future(ask(gateway))
            await eventually(lambda: len(others.requests) == 1)
            gateway.pools["big"].may_wake.set()
            assert await asked == (200, None)
            assert len(own.requests) == 1
            line = json.loads(gateway.lines[-1])
            assert (line["model"], line["fallback_for"]) == ("big", None)

    asyncio.run(run())


def test_full_pool_without_a_fallback_that_answers_gives_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not asked twice."""

    async def run() -> None:
        async with serving(monkeypatch, "big", big=refuses(429)) as (gateway, own, _):
            async with gateway.post(BIG, headers=ALLOW) as answer:
                assert (answer.status, (await answer.json())["error"]["message"]) == (429, "refused with 429")
            assert len(own.requests) == 1

    asyncio.run(run())


def test_fallback_that_the_key_may_not_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next in the list answers."""
    keys = {hashlib.sha256(name.encode()).hexdigest(): name for name in ("all", "some")}
    clients = ClientRegistry(keys, models={"some": frozenset({"big", "second"})})

    async def run() -> None:
        async with serving(monkeypatch, "tiny", "second", clients=clients) as (gateway, _, _others):
            for key, served in (("all", "tiny"), ("some", "second")):
                async with gateway.post(BIG, headers={**ALLOW, "x-api-key": key}) as answer:
                    assert answer.headers["X-Served-Model"] == served

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/tokenize", "/v1/embeddings", "/v1/messages/count_tokens"])
def test_routes_whose_answer_is_tied_to_its_model_have_no_fallback(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Tokens and vectors of another model would be wrong without a sign of it."""

    async def run() -> None:
        async with serving(monkeypatch, "tiny", hold_s=0.1) as (gateway, _, others):
            async with gateway.post({**BIG, "input": "x"}, path, headers=ALLOW) as answer:
                assert answer.status == 503
            assert others.requests == []

    asyncio.run(run())


def test_fallback_counts_as_used_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A local engine is not evicted for the wake of the wanted one while it is about to answer."""

    async def run() -> None:
        async with serving(monkeypatch, "tiny") as (gateway, _, _others):
            monkeypatch.setattr(fallback, "GRACE_S", 30.0)
            asked = asyncio.ensure_future(ask(gateway))
            await eventually(lambda: gateway.pools["tiny"].in_use == 1)
            asked.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asked
            await eventually(lambda: gateway.pools["tiny"].in_use == 0)
            gateway.pools["big"].may_wake.set()

    asyncio.run(run())
