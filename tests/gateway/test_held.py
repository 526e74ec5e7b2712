"""Requests that are held for a cold pool: how many, what further ones get, and what a waiting stream is told."""

from __future__ import annotations

import asyncio
import re
import time

import aiohttp

from service.gateway.clients import ClientRegistry
from service.gateway.held import HeldRequests
from tests.gateway.upstream import (
    ALICE,
    ASK,
    BOB,
    KEYS,
    STREAMED,
    Engine,
    RunningGateway,
    TestPool,
    answers,
    eventually,
    serve_gateway,
)


def _pool(gateway: RunningGateway, engine: Engine) -> TestPool:
    pool = gateway.app._inference._router.find("tiny").pool
    assert isinstance(pool, TestPool)
    pool.url = engine.url
    return pool


async def _answer(gateway: RunningGateway, headers: dict[str, str]) -> tuple[int, str, str | None]:
    async with gateway.post(ASK, headers=headers) as answer:
        error = (await answer.json()).get("error", {})
        return answer.status, error.get("code", ""), answer.headers.get("Retry-After")


def test_held_requests_are_limited_per_key_and_per_pool() -> None:
    """One above is refused at once with the time after which to retry; those that are held are answered."""

    async def run() -> None:
        limits = HeldRequests(per_pool=3, per_key=2)
        async with (
            Engine(answers).serving() as engine,
            serve_gateway(ClientRegistry(KEYS), held=limits) as gateway,
        ):
            pool = _pool(gateway, engine)
            clients = []
            for number, headers in enumerate((ALICE, ALICE, BOB), 1):
                clients.append(asyncio.ensure_future(_answer(gateway, headers)))
                await eventually(lambda number=number: pool.in_use == number)  # type: ignore[misc]
            assert await _answer(gateway, ALICE) == (429, "rate_limit_exceeded", "30")
            assert await _answer(gateway, BOB) == (503, "overloaded", "30")
            pool.may_wake.set()
            assert [status for status, _, _ in await asyncio.gather(*clients)] == [200] * 3
            assert await _answer(gateway, ALICE) == (200, "", None)
            assert pool.wakes == 1

    asyncio.run(run())


def test_held_request_is_listed_as_held_until_its_pool_is_ready() -> None:
    """Although a stream has got comments meanwhile; and what an engine works for is not held, streamed or whole."""

    async def held(gateway: RunningGateway) -> list[bool]:
        async with gateway.http.get(gateway.url + "/v1/requests") as answer:
            running = (await answer.json())["running"]
        return [row[running["columns"].index("held")] for row in running["data"]]

    async def silent(_: object, __: object) -> None:
        await asyncio.sleep(60)

    async def run() -> None:
        engine = Engine(silent)
        async with engine.serving(), serve_gateway(comment_interval_s=0.02) as gateway:
            pool = _pool(gateway, engine)
            whole = asyncio.ensure_future(_answer(gateway, {}))
            async with gateway.post(STREAMED) as stream:
                await stream.content.readuntil(b"\n\n")
                await eventually(lambda: pool.in_use == 2)
                assert await held(gateway) == [True, True]
                pool.may_wake.set()
                await eventually(lambda: len(engine.requests) == 2)
                assert await held(gateway) == [False, False]
            whole.cancel()

    asyncio.run(run())


def test_held_request_whose_client_leaves_frees_its_place() -> None:
    """Its key and its pool may hold another."""

    async def run() -> None:
        async with (
            Engine(answers).serving() as engine,
            serve_gateway(ClientRegistry(KEYS), held=HeldRequests(per_pool=1, per_key=1)) as gateway,
        ):
            pool = _pool(gateway, engine)
            first = asyncio.ensure_future(_answer(gateway, ALICE))
            await eventually(lambda: pool.in_use == 1)
            first.cancel()
            await eventually(lambda: pool.in_use == 0)
            second = asyncio.ensure_future(_answer(gateway, ALICE))
            await eventually(lambda: pool.in_use == 1)
            pool.may_wake.set()
            assert (await second)[0] == 200

    asyncio.run(run())


def test_held_stream_is_told_its_position_and_the_seconds_left() -> None:
    """The seconds are those of recorded boots, less what the wake has taken; the position is among the held."""

    async def first_comment(answer: aiohttp.ClientResponse) -> str:
        return (await answer.content.readuntil(b"\n\n")).decode()

    async def recorded() -> float:
        return 90.0

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(comment_interval_s=0.05) as gateway:
            pool = _pool(gateway, engine)
            pool.recorded_s = recorded  # type: ignore[method-assign]
            async with gateway.post(STREAMED) as one, gateway.post(STREAMED) as two:
                for answer, position in ((one, "1 of [12]"), (two, "2 of 2")):
                    told = await first_comment(answer)
                    shape = rf": waking tiny on H100, \d s, about (89|90) s left, position {position}\n\n"
                    assert re.fullmatch(shape, told), told
                pool._woken_at = time.monotonic() - 100
                assert (pool.left_s, pool.retry_after_s) == (0.0, 1)
                pool.may_wake.set()

    asyncio.run(run())
