"""Modal's limits and faults: while a pool wakes they mean "not yet", of a forwarded request they are the error."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable

import pytest

from service.gateway import modal_pool, redirects
from service.gateway.call_rate import CallRate
from service.gateway.pool import Endpoint
from service.in_engine.vllm_service.api_error import APIError
from tests.gateway.test_modal_pool import healthy, pool
from tests.gateway.upstream import ASK, STREAMED, Behaviour, Engine, Request, RunningGateway, answers, serve_gateway

LOOP = b"HTTP/1.1 303 See Other\r\nlocation: /later?id=1\r\ncontent-length: 0\r\n\r\n"


def says(status: int, *headers: str, text: str = "modal-http: no\n") -> Behaviour:
    """Return what answers in plain text, as Modal's proxy does."""

    async def behave(_: Request, writer: asyncio.StreamWriter) -> None:
        lines = "".join(f"{header}\r\n" for header in headers)
        head = f"HTTP/1.1 {status} X\r\ncontent-type: text/plain\r\ncontent-length: {len(text)}\r\n{lines}\r\n"
        writer.write(head.encode() + text.encode())
        await writer.drain()

    return behave


async def loops(_: Request, writer: asyncio.StreamWriter) -> None:
    """Redirect at once, as Modal does in a crash loop."""
    writer.write(LOOP)
    await writer.drain()


async def resets(_: Request, writer: asyncio.StreamWriter) -> None:
    """Break off the connection."""
    writer.transport.abort()


def in_turn(*behaviours: Behaviour) -> Behaviour:
    """Return what behaves so, one request after another, and then like the last one."""
    left = list(behaviours)

    async def behave(request: Request, writer: asyncio.StreamWriter) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(request, writer)

    return behave


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait between redirects and health checks."""
    monkeypatch.setattr(redirects, "_LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(redirects, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(modal_pool, "_LONGEST_HEALTH_PAUSE_S", 0.01)


def woken(behaviour: Behaviour) -> Engine:
    """Wake a pool on Modal at what behaves so; return it with its requests."""

    async def run() -> Engine:
        async with Engine(behaviour).serving() as engine:
            one = pool(app="team")
            one._tier._url = engine.url
            endpoint = await one.ready()
            assert endpoint.own_calls is not None
            return engine

    return asyncio.run(run())


def test_wake_takes_modals_limits_and_faults_for_not_yet() -> None:
    """429, 408, 502, 503, redirects and connections that break off are asked again; nothing fails."""
    faults = (says(429), says(408), resets, says(502), says(503), loops, loops, says(408), healthy)
    assert len(woken(in_turn(*faults)).requests) == len(faults)


def test_wake_waits_as_long_as_modal_says() -> None:
    """`Retry-After` goes before the gateway's own pauses."""
    began = time.monotonic()
    woken(in_turn(says(429, "retry-after: 1"), healthy))
    assert 1.0 <= time.monotonic() - began < 5.0


def test_wake_in_a_crash_loop_fails_after_a_bound_with_the_log_to_look_at() -> None:
    """Redirect after redirect at once means that containers end: one call is followed, and no other begun."""

    async def run() -> None:
        async with Engine(loops).serving() as engine:
            one = pool(app="team")
            one._tier._url = engine.url
            with pytest.raises(
                APIError, match=r"end before they are ready\. Its log: vllm-service logs qwen3-8b"
            ) as told:
                await one.ready()
            assert told.value.headers == {"Retry-After": "5", "x-should-retry": "false"}
            assert len(engine.requests) == redirects.MOST_AT_ONCE + 1
            assert [request.line.split()[1] for request in engine.requests[1:]] == ["/later?id=1"] * (
                redirects.MOST_AT_ONCE
            )

    asyncio.run(run())


def test_wake_fails_when_faults_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that answers nothing but 502 is no slow boot; a later attempt may succeed."""
    monkeypatch.setattr(modal_pool, "_FAULTS_S", 0.1)
    with pytest.raises(APIError, match="502") as told:
        woken(says(502))
    assert "Retry-After" in told.value.headers


def forwarded(behaviour: Behaviour, check: Callable[[RunningGateway, Engine], Awaitable[None]]) -> None:
    """Check requests through a gateway whose pool is ready, behind Modal's proxy."""

    async def run() -> None:
        async with Engine(behaviour).serving() as engine, serve_gateway(url=engine.url) as gateway:
            one = gateway.app._inference._router.find("tiny").pool
            one._endpoint = Endpoint(engine.url, own_calls=CallRate())  # type: ignore[attr-defined]
            await check(gateway, engine)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("behaviour", "status", "code"),
    [
        (says(429), 429, "platform_rate_limited"),
        (says(429, "retry-after: 7"), 429, "platform_rate_limited"),
        (says(408), 504, "platform_timeout"),
        (says(502), 502, "engine_lost"),
        (resets, 502, "engine_lost"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_forwarded_request_gets_modals_answer_in_its_own_protocol(
    path: str, behaviour: Behaviour, status: int, code: str
) -> None:
    """With `Retry-After`, Modal's own where it says one; the request is sent once."""

    async def check(gateway: RunningGateway, engine: Engine) -> None:
        for body in (ASK, STREAMED):
            before = len(engine.requests)
            async with gateway.post(body, path) as answer:
                error = (await answer.json())["error"]
                assert answer.status == status
                assert int(answer.headers["Retry-After"]) >= 1
                assert path == "/v1/messages" or error["code"] == code
                assert "modal-http" not in error["message"]
            assert len(engine.requests) == before + 1
            assert json.loads(gateway.lines[-1])["code"] == code
            one = gateway.app._inference._router.find("tiny").pool
            one._endpoint = Endpoint(engine.url, own_calls=CallRate())  # type: ignore[attr-defined]

    forwarded(behaviour, check)


def test_forwarded_request_in_a_crash_loop_ends_and_is_sent_once() -> None:
    """Modal has queued it: only its answer is asked for, a bounded number of times."""

    async def check(gateway: RunningGateway, engine: Engine) -> None:
        async with gateway.post(ASK) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (503, "model_failed")
            assert answer.headers["x-should-retry"] == "false"
        assert [request.line.split()[0] for request in engine.requests] == ["POST", *["GET"] * redirects.MOST_AT_ONCE]

    forwarded(loops, check)


def test_forwarded_request_that_modal_has_queued_survives_faults_while_it_waits() -> None:
    """Its answer is asked for again after 429, 502 and connections that break off."""

    async def check(gateway: RunningGateway, engine: Engine) -> None:
        async with gateway.post(ASK) as answer:
            assert answer.status == 200
        assert [request.line.split()[0] for request in engine.requests] == ["POST", *["GET"] * 5]

    forwarded(in_turn(loops, says(429), resets, says(502), loops, answers), check)


def test_forwarded_request_on_a_kept_connection_to_modal_is_not_sent_again() -> None:
    """Modal's proxy may have queued what it read, so a connection that it breaks off tells nothing."""

    async def check(gateway: RunningGateway, engine: Engine) -> None:
        for expected in (200, 502):
            async with gateway.post(ASK) as answer:
                assert answer.status == expected
        assert len(engine.requests) == 2

    forwarded(in_turn(answers, resets), check)


def test_own_calls_pass_at_a_rate() -> None:
    """A burst passes at once, and the rest evenly; a pause allows a burst again."""
    now = 0.0
    rate = CallRate(per_s=10, burst=3, clock=lambda: now)
    assert [round(rate.reserve(), 3) for _ in range(5)] == [0.0, 0.0, 0.0, 0.1, 0.2]
    now = 1.0
    assert [round(rate.reserve(), 3) for _ in range(4)] == [0.0, 0.0, 0.0, 0.1]
