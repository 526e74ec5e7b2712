"""The limits of a key: what is let in, the errors above, and the headers that tell what is left."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import openai
import pytest

from service.gateway.api_client import ApiClient
from service.gateway.clients import ClientRegistry
from service.gateway.metrics import RequestLog
from service.in_engine.vllm_service.api_error import APIError
from service.usage.limits import KeyLimits
from tests.gateway.upstream import ALICE, ASK, BOB, KEYS, Engine, answers, eventually, serve_gateway, streams

NOON = 1_796_040_000.0  # 2026-11-30 12:00:00 UTC


class Clock:
    """Time as a test sets it."""

    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        """Return it."""
        return self.now


def client_with(clock: Clock, **limits: Any) -> ApiClient:
    """Return a client with these limits."""
    return ApiClient("alice", KeyLimits(**limits), clock=clock, wall_clock=clock)


def use(client: ApiClient, tokens: int | None = None, dollars: float | None = None, body: int = 0) -> None:
    """Make a request that used so much."""
    log = RequestLog("id", "POST", "/v1/completions", dollars=dollars)
    with client.request(log) as running:
        if running.counts_tokens:
            running.reserve(body, 10, None)
        if tokens is not None:
            log.tail = b'"prompt_tokens": 0, "completion_tokens": %d' % tokens


def refused(client: ApiClient) -> APIError:
    """Insist that a request is refused, and return its error."""
    with pytest.raises(APIError) as caught:
        use(client)
    return caught.value


@pytest.mark.parametrize("limits", [{"concurrency": 100}, {"requests_per_minute": 100}, {"tokens_per_minute": 100_000}])
def test_of_a_thousand_requests_at_once_a_hundred_are_let_in(limits: dict[str, int]) -> None:
    """Through the server, each on a connection of its own; running requests count with an estimate of their tokens."""
    clients = ClientRegistry(KEYS, {"alice": KeyLimits(**limits)})

    async def run() -> None:
        async with (
            Engine(streams(b"data: {}\n\n", ends=False)).serving() as engine,
            serve_gateway(clients, url=engine.url) as gateway,
        ):
            body = ASK | {"stream": True, "max_tokens": 990}
            before = len(json.dumps(body)) // 4 + 990
            most = 100 if "tokens_per_minute" not in limits else -(-100_000 // before)
            tasks = [asyncio.ensure_future(status(gateway.post(body, headers=ALICE))) for _ in range(1000)]
            await eventually(lambda: sum(task.done() for task in tasks) == 1000, 60)
            assert sorted({task.result() for task in tasks}) == [200, 429]
            assert sum(task.result() == 200 for task in tasks) == len(engine.requests) == most
            for answer in held:
                answer.close()

    held: list[aiohttp.ClientResponse] = []

    async def status(asked: Any) -> int:
        answer = await asked
        held.append(answer)  # its stream runs on
        return int(answer.status)

    asyncio.run(run())


def test_tokens_of_a_minute_end_with_the_time_to_wait() -> None:
    """What the engine reported counts, of requests that have ended; a minute later it no longer does."""
    clock = Clock()
    client = client_with(clock, tokens_per_minute=100)
    use(client, tokens=60)
    clock.now += 20
    use(client, tokens=60)

    error = refused(client)

    assert (error.status, error.code, error.headers["Retry-After"]) == (429, "rate_limit_exceeded", "40")
    clock.now += 40
    use(client, tokens=1)


def test_tokens_that_nobody_reported_count_as_estimated_for_a_minute() -> None:
    """A client that leaves before the end gets nothing for free."""
    clock = Clock()
    client = client_with(clock, tokens_per_minute=100, tokens_per_day=1000)
    use(client, tokens=None, body=400)

    assert refused(client).code == "rate_limit_exceeded"
    assert client.day_tokens.used() == 0  # the ledger learns of them from the engine


def test_request_that_an_engine_never_had_takes_no_tokens() -> None:
    """An error of the gateway gives the estimate back."""
    client = client_with(Clock(), tokens_per_minute=100)
    with pytest.raises(APIError), client.request() as running:
        running.reserve(4000, 10, None)
        raise APIError(404, "no such model")

    assert (client.reserved, dict(client.rate_headers("/v1/x"))[b"x-ratelimit-remaining-tokens"]) == (0, b"100")


@pytest.mark.parametrize(
    ("limits", "used", "what", "ends"),
    [
        ({"tokens_per_day": 100}, {"tokens": 100}, "100 tokens of today", "2026-12-01T00:00:00Z"),
        ({"dollars_per_month": 5.0}, {"dollars": 5.0}, "$5 of this month", "2026-12-01T00:00:00Z"),
    ],
)
def test_quota_that_is_used_up_names_its_end_and_asks_for_no_retry(
    limits: dict[str, Any], used: dict[str, Any], what: str, ends: str
) -> None:
    """As OpenAI's API does; afterwards requests are served again, whatever the clock does before."""
    clock = Clock()
    client = client_with(clock, **limits)
    use(client, **used)

    error = refused(client)

    assert (error.status, error.code) == (429, "insufficient_quota")
    assert what in error.message
    assert ends in error.message
    assert (error.headers["Retry-After"], error.headers["x-should-retry"]) == ("43200", "false")
    clock.now -= 86_400 * 40  # set back, to another day and month
    use(client)
    clock.now += 86_400 * 41
    use(client)


def test_quota_counts_what_the_ledger_has_of_other_gateways() -> None:
    """Its sum is taken where it is more, and only for the period that is now."""
    clock = Clock()
    client = client_with(clock, tokens_per_day=100)
    client.day_tokens.observe(NOON - 43_200 - 86_400, 500)
    use(client, tokens=10)
    client.day_tokens.observe(NOON - 43_200, 100)

    assert refused(client).code == "insufficient_quota"


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/v1/chat/completions", ("x-ratelimit-limit-", "x-ratelimit-remaining-", "x-ratelimit-reset-")),
        (
            "/v1/messages",
            ("anthropic-ratelimit-{}-limit", "anthropic-ratelimit-{}-remaining", "anthropic-ratelimit-{}-reset"),
        ),
    ],
)
def test_answers_tell_what_is_left_in_their_protocols_headers(path: str, names: tuple[str, ...]) -> None:
    """Of both limits of a minute, with an error too; a key without limits has none of them."""
    clients = ClientRegistry(KEYS, {"alice": KeyLimits(requests_per_minute=2, tokens_per_minute=1000)})
    requests, tokens = (
        [name.format(what) if "{}" in name else name + what for name in names] for what in ("requests", "tokens")
    )

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(clients, url=engine.url) as gateway:
            body = ASK | {"max_tokens": 1}
            seen = []
            for headers in (ALICE, ALICE, ALICE, BOB):
                async with gateway.post(body, path, headers=headers) as answer:
                    seen.append((answer.status, answer.headers))
            assert [status for status, _ in seen] == [200, 200, 429, 200]
            limited = [headers for _, headers in seen[:3]]
            assert [headers[requests[0]] for headers in limited] == ["2", "2", "2"]
            assert [headers[requests[1]] for headers in limited] == ["1", "0", "0"]
            assert [headers[tokens[0]] for headers in limited] == ["1000"] * 3
            assert int(limited[2][tokens[1]]) == 1000 - 2 * 7
            assert all(headers[requests[2]] and headers[tokens[2]] for headers in limited)
            assert not [name for name in seen[3][1] if "ratelimit" in name.lower()]

    asyncio.run(run())


def test_openai_client_reads_the_headers_and_waits_as_long_as_it_is_told() -> None:
    """The official client repeats the request after `Retry-After`, and reports a quota at once."""
    clients = ClientRegistry(KEYS, {"alice": KeyLimits(concurrency=1, requests_per_minute=100)})

    async def run() -> None:
        async with (
            Engine(streams(b"data: {}\n\n", ends=False)).serving() as engine,
            serve_gateway(clients, url=engine.url) as gateway,
            openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key="a-key", max_retries=3) as client,
        ):
            running = await gateway.post(ASK | {"stream": True}, headers=ALICE)
            began = asyncio.get_running_loop().time()
            asked = asyncio.ensure_future(client.chat.completions.with_raw_response.create(model="tiny", messages=[]))
            await eventually(lambda: any('"rate_limit_exceeded"' in line for line in gateway.lines))
            engine.behaviour = answers
            running.close()
            answer = await asked
            took_s = asyncio.get_running_loop().time() - began
            assert 0.9 <= took_s < 10, took_s
            assert answer.headers["x-ratelimit-limit-requests"] == "100"
            assert int(answer.headers["x-ratelimit-remaining-requests"]) <= 98

            for one in clients:
                one.allow(KeyLimits(tokens_per_day=1), None)
            await client.chat.completions.create(model="tiny", messages=[])
            sent = len(engine.requests)
            with pytest.raises(openai.RateLimitError) as caught:
                await client.chat.completions.create(model="tiny", messages=[])
            assert caught.value.code == "insufficient_quota"
            assert len(engine.requests) == sent
            assert len([line for line in gateway.lines if '"insufficient_quota"' in line]) == 1

    asyncio.run(run())
