"""Requests forwarded to an engine and answers forwarded to the client: bytes, ends, failures, and leaks."""

from __future__ import annotations

import asyncio
import io
import json
import random
import socket

import aiohttp
import pytest

from service.gateway.upstream import open_session
from tests.gateway.upstream import STREAM, Engine, Request, answers, chunk, eventually, serve_gateway, streams

EVENT = b'data: {"choices":[{"delta":{"content":"caf\xc3\xa9"}}]}\n\n'
ASK = {"model": "tiny", "messages": []}
STREAMED = ASK | {"stream": True}


def test_proxy_passes_an_answer_unchanged() -> None:
    """Status, body, the client's headers without its key, the pool's key and query, one request id throughout."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            headers = {"Authorization": "Bearer of-the-client", "X-Request-Id": "abc", "X-Mine": "1", "Modal-Key": "x"}
            async with gateway.post(ASK, headers=headers) as answer:
                assert (answer.status, answer.headers["x-request-id"]) == (200, "abc")
                assert (await answer.json())["usage"]["prompt_tokens"] == 3
            (request,) = engine.requests
            assert request.line == "POST /v1/chat/completions?model=tiny HTTP/1.1"
            assert request.headers["authorization"] == "Bearer of-the-pool"
            assert (request.headers["x-request-id"], request.headers["x-mine"]) == ("abc", "1")
            assert "modal-key" not in request.headers
            assert json.loads(request.body) == ASK

    asyncio.run(run())


def test_proxy_stream_with_split_characters_passes_unchanged() -> None:
    """A chunk that ends inside a character is neither decoded nor held back."""
    cut = EVENT.index(b"\xc3") + 1
    pieces = [EVENT[:cut], EVENT[cut:], b"data: [DONE]\n\n"]

    async def run() -> None:
        taken = asyncio.Semaphore(1)  # a piece is sent once the one before it was taken

        async def behave(request: Request, writer: asyncio.StreamWriter) -> None:
            del request
            writer.write(STREAM)
            for piece in [*pieces, b""]:
                await taken.acquire()
                writer.write(chunk(piece))
                await writer.drain()

        async with Engine(behave).serving() as engine, serve_gateway(url=engine.url) as gateway:
            async with gateway.post(STREAMED) as answer:
                assert answer.content_type == "text/event-stream"
                assert "x-engine-pid" not in answer.headers
                got = []
                async for data in answer.content.iter_any():
                    got.append(data)
                    taken.release()
            assert got == pieces

    asyncio.run(run())


def test_proxy_large_body_reaches_the_engine_whole() -> None:
    """Ten megabytes of an image, in a body whose model is a name that the engine does not know."""
    image = "data:image/png;base64," + "A" * 10_000_000

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            body = io.BytesIO(json.dumps({"model": "TINY-h200", "image": image}).encode())
            async with gateway.http.post(f"{gateway.url}/v1/chat/completions", data=body) as answer:
                assert answer.status == 200
            sent = json.loads(engine.requests[0].body)
            assert sent == {"model": "tiny", "image": image}

    asyncio.run(run())


def test_proxy_client_that_leaves_stops_the_generation() -> None:
    """The engine's connection is closed, during a stream and before its first byte."""

    async def silent(request: Request, writer: asyncio.StreamWriter) -> None:
        del writer
        await request.gone.wait()

    async def run(behaviour: object, body: object) -> None:
        async with Engine(behaviour).serving() as engine, serve_gateway(url=engine.url) as gateway:  # type: ignore[arg-type]
            asking = asyncio.ensure_future(_take_one(gateway.post(body)))
            await eventually(lambda: len(engine.requests) == 1)
            await asyncio.sleep(0.05)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            async with asyncio.timeout(5):
                await engine.requests[0].gone.wait()
            await eventually(lambda: len(gateway.lines) == 1)
            assert json.loads(gateway.lines[0])["client_left"]

    asyncio.run(run(streams(EVENT, ends=False), STREAMED))
    asyncio.run(run(silent, ASK))
    asyncio.run(run(silent, STREAMED))


async def _take_one(context: object) -> None:
    async with context as answer:  # type: ignore[attr-defined]
        async for _ in answer.content.iter_any():
            await asyncio.sleep(60)


def test_proxy_leaks_nothing_when_a_thousand_clients_leave_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """No task, no socket and no generation is left, at whatever moment they leave."""
    sessions: list[aiohttp.ClientSession] = []

    def recorded_session() -> aiohttp.ClientSession:
        sessions.append(open_session())
        return sessions[-1]

    monkeypatch.setattr("service.gateway.app.open_session", recorded_session)

    async def run() -> None:
        behaviour = streams(*[EVENT] * 20, pause_s=0.02)
        async with Engine(behaviour).serving() as engine, serve_gateway(url=engine.url) as gateway:
            chance = random.Random(7)  # noqa: S311 - it decides when a client leaves
            before = len(asyncio.all_tasks())

            async def one(number: int) -> None:
                writer = None
                try:
                    async with asyncio.timeout(chance.uniform(0.001, 0.4)):
                        host, port = gateway.url.removeprefix("http://").split(":")
                        reader, writer = await asyncio.open_connection(host, int(port))
                        body = json.dumps(STREAMED if number % 3 else ASK).encode()
                        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
                        writer.write(head.encode() + body[: chance.choice((len(body), len(body) // 2))])
                        while await reader.read(65536):
                            pass
                except TimeoutError:
                    pass
                finally:
                    if writer:
                        writer.transport.abort()

            for first in range(0, 1000, 100):
                await asyncio.gather(*(one(number) for number in range(first, first + 100)))
            assert len(engine.requests) > 100
            await eventually(lambda: engine.running == 0)
            await eventually(lambda: gateway.pools["tiny"].in_use == 0)
            await gateway.http.close()
            # an engine's connection that is kept for the next request is a task of the stub's own
            await eventually(lambda: len(asyncio.all_tasks()) <= before + _kept(sessions[0]))
            assert _kept(sessions[0]) <= 100

    asyncio.run(run())


def _kept(open_session: aiohttp.ClientSession) -> int:
    assert open_session.connector
    return sum(len(kept) for kept in open_session.connector._conns.values())


def test_proxy_ends_each_stream_with_an_error_when_the_pool_dies_and_serves_the_next_request() -> None:
    """Fifty streams end with an error event; a new replica answers the next request."""

    async def run() -> None:
        async with (
            Engine(streams(EVENT, ends=False)).serving() as first,
            Engine(answers).serving() as second,
            serve_gateway(url=first.url) as gateway,
        ):

            async def one() -> bytes:
                async with gateway.post(STREAMED) as answer:
                    return await answer.content.read()

            clients = [asyncio.ensure_future(one()) for _ in range(50)]
            await eventually(lambda: first.running == 50)
            await asyncio.sleep(0.1)
            gateway.pools["tiny"].url = second.url
            await first.die()
            for text in await asyncio.gather(*clients):
                assert text.startswith(EVENT)
                error = json.loads(text.removeprefix(EVENT).split(b"\n")[0].removeprefix(b"data: "))["error"]
                assert (error["code"], error["status"]) == ("engine_lost", 502)
                assert text.endswith(b"data: [DONE]\n\n")
            async with gateway.post(ASK) as answer:
                assert answer.status == 200
            assert gateway.pools["tiny"].wakes == 2

    asyncio.run(run())


def test_proxy_answer_that_breaks_off_inside_a_line_ends_the_line_first() -> None:
    """The broken line is not joined with the error that follows."""

    async def breaks(request: Request, writer: asyncio.StreamWriter) -> None:
        del request
        writer.write(STREAM + chunk(EVENT[:10]))
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    async def run() -> None:
        async with Engine(breaks).serving() as engine, serve_gateway(url=engine.url) as gateway:
            async with gateway.post(STREAMED) as answer:
                text = await answer.content.read()
            assert text.startswith(EVENT[:10] + b'\n\ndata: {"error"')

    asyncio.run(run())


def test_proxy_body_that_breaks_off_breaks_off_for_the_client() -> None:
    """Half an answer must not look like a whole one."""

    async def breaks(request: Request, writer: asyncio.StreamWriter) -> None:
        del request
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    async def run() -> None:
        async with Engine(breaks).serving() as engine, serve_gateway(url=engine.url) as gateway:
            with pytest.raises(aiohttp.ClientError):
                async with gateway.post(ASK) as answer:
                    await answer.read()

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


def test_proxy_slow_reader_holds_the_engine_back() -> None:
    """A client that does not read costs a bounded amount of memory: the engine's writes wait."""
    written = 0

    async def floods(request: Request, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(STREAM)
        while True:
            writer.write(chunk(b"x" * 65536))
            written += 65536
            await writer.drain()

    async def run() -> None:
        async with Engine(floods).serving() as engine, serve_gateway(url=engine.url) as gateway:
            host, port = gateway.url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as client:
                body = json.dumps(STREAMED).encode()
                head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
                client.sendall(head.encode() + body)
                await eventually(lambda: written > 0)
                before = -1
                while written != before:  # until it stands still
                    before = written
                    await asyncio.sleep(0.2)
            assert written < 32 * 1024 * 1024  # the kernel's buffers of two connections

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
