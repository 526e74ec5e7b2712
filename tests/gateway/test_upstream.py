"""Requests to engines: what is sent, over which connections, and whether it is sent again."""

from __future__ import annotations

import asyncio
import io
import json

from tests.gateway.upstream import ASK, Engine, Request, answers, serve_gateway


def test_proxy_large_body_reaches_the_engine_whole() -> None:
    """Ten megabytes of an image, in a body whose model is a name that the engine does not know."""
    image = "data:image/png;base64," + "A" * 10_000_000

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            body = io.BytesIO(json.dumps({"model": "TINY-h200", "image": image}).encode())
            headers = {"Content-Type": "application/json"}
            async with gateway.http.post(gateway.url + "/v1/chat/completions", data=body, headers=headers) as answer:
                assert answer.status == 200
            sent = json.loads(engine.requests[0].body)
            assert sent == {"model": "tiny", "image": image}

    asyncio.run(run())


def test_proxy_connection_that_the_engine_closed_meanwhile_is_replaced() -> None:
    """A request on a connection that the engine closed before is sent again; the client sees no error."""

    async def closes(request: Request, writer: asyncio.StreamWriter) -> None:
        if len(engine.requests) == 2:
            writer.transport.abort()
        else:
            await answers(request, writer)

    engine = Engine(closes)

    async def run() -> None:
        async with engine.serving(), serve_gateway(url=engine.url) as gateway:
            for _ in range(2):
                async with gateway.post(ASK) as answer:
                    assert answer.status == 200
            assert len(engine.requests) == 3

    asyncio.run(run())


def test_proxy_request_that_kills_its_engine_is_not_sent_to_another() -> None:
    """On a new connection the engine may have read it all: the client gets the error and decides."""

    async def dies(request: Request, writer: asyncio.StreamWriter) -> None:
        del request
        writer.transport.abort()

    async def run() -> None:
        async with Engine(dies).serving() as engine, serve_gateway(url=engine.url) as gateway:
            async with gateway.post(ASK) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (502, "engine_lost")
            assert len(engine.requests) == 1

    asyncio.run(run())


def test_proxy_request_that_its_engine_had_for_a_while_is_not_sent_to_another() -> None:
    """On a connection from before too: an engine that dies later has read it, and no request is answered twice."""

    async def dies_late(request: Request, writer: asyncio.StreamWriter) -> None:
        if len(engine.requests) == 2:
            await asyncio.sleep(0.6)
            writer.transport.abort()
        else:
            await answers(request, writer)

    engine = Engine(dies_late)

    async def run() -> None:
        async with engine.serving(), serve_gateway(url=engine.url) as gateway:
            statuses = []
            for _ in range(2):
                async with gateway.post(ASK) as answer:
                    statuses.append((answer.status, (await answer.json()).get("error", {}).get("code")))
            assert statuses == [(200, None), (502, "engine_lost")]
            assert len(engine.requests) == 2

    asyncio.run(run())


def test_proxy_request_whose_answer_had_begun_is_not_sent_again() -> None:
    """On a connection from before too: an engine that writes has read it."""

    async def breaks_off(request: Request, writer: asyncio.StreamWriter) -> None:
        if len(engine.requests) == 2:
            writer.write(b"HTTP/1.1 200 O")
            await writer.drain()
            writer.close()
        else:
            await answers(request, writer)

    engine = Engine(breaks_off)

    async def run() -> None:
        async with engine.serving(), serve_gateway(url=engine.url) as gateway:
            statuses = []
            for _ in range(2):
                async with gateway.post(ASK) as answer:
                    statuses.append((answer.status, (await answer.json()).get("error", {}).get("code")))
            assert statuses == [(200, None), (502, "engine_lost")]
            assert len(engine.requests) == 2

    asyncio.run(run())


def test_proxy_clients_query_reaches_no_engine() -> None:
    """On Modal a query chooses the container: `n_gpu` in it would mean another pool."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            async with gateway.post(
                ASK, "/v1/chat/completions?n_gpu=7&model=other&__modal_function_call_id=fc-1"
            ) as answer:
                assert answer.status == 200
            assert engine.requests[0].line == "POST /v1/chat/completions?model=tiny HTTP/1.1"

    asyncio.run(run())


def test_proxy_follows_modals_redirect_to_the_answer() -> None:
    """After 150 s Modal answers 303; the answer is fetched from there with the pool's key, on the same host only."""

    async def later(request: Request, writer: asyncio.StreamWriter) -> None:
        if request.line.startswith("POST"):
            writer.write(b"HTTP/1.1 303 See Other\r\nlocation: /later?id=1\r\ncontent-length: 0\r\n\r\n")
            await writer.drain()
        else:
            assert request.headers["authorization"] == "Bearer of-the-pool"
            await answers(request, writer)

    async def elsewhere(request: Request, writer: asyncio.StreamWriter) -> None:
        del request
        writer.write(b"HTTP/1.1 303 See Other\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()

    async def run() -> None:
        async with Engine(later).serving() as engine, serve_gateway(url=engine.url) as gateway:
            async with gateway.post(ASK) as answer:
                assert answer.status == 200
            assert engine.requests[1].line == "GET /later?id=1 HTTP/1.1"
        async with (
            Engine(elsewhere).serving() as engine,
            serve_gateway(url=engine.url) as gateway,
            gateway.post(ASK) as answer,
        ):
            assert answer.status == 502

    asyncio.run(run())
