"""Answers forwarded to the client: bytes, comments, clients that leave or read slowly, and leaks."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import socket

import pytest
from yarl import URL

from service.gateway.http_client.connections import Connections
from service.gateway.upstream import open_connections
from tests.gateway.upstream import (
    ASK,
    STREAM,
    STREAMED,
    Engine,
    Request,
    answers,
    chunk,
    eventually,
    no_descriptors,
    serve_gateway,
    streams,
)

EVENT = b'data: {"choices":[{"delta":{"content":"caf\xc3\xa9"}}]}\n\n'
WITHHELD = {
    **{"Modal-Key": "x", "X-Data-Parallel-Rank": "1", "X-Vllm-Priority": "-9", "Cookie": "a=b", "X-Mine": "1"},
    **{"Accept-Encoding": "gzip", "X-Api-Key": "x", "Forwarded": "for=x", "HTTP2-Settings": "x"},
}
HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
    "content-type: application/json\r\ncontent-length: {}\r\n\r\n"
)


def test_proxy_passes_an_answer_unchanged() -> None:
    """Status, body, headers that engines need, the pool's key and query, one request id throughout."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            headers = {"Authorization": "Bearer of-the-client", "X-Request-Id": "abc", "Traceparent": "1", **WITHHELD}
            headers["X-Api-Client"] = "another"
            async with gateway.post(ASK, headers=headers) as answer:
                assert (answer.status, answer.headers["x-request-id"]) == (200, "abc")
                assert (await answer.json())["usage"]["prompt_tokens"] == 3
            (request,) = engine.requests
            assert request.line == "POST /v1/chat/completions?model=tiny HTTP/1.1"
            assert request.headers["authorization"] == "Bearer of-the-pool"
            assert (request.headers["x-request-id"], request.headers["traceparent"]) == ("abc", "1")
            assert request.headers["x-api-client"] == "anonymous"
            assert not {name.lower() for name in WITHHELD} & set(request.headers)
            assert json.loads(request.body) == ASK

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_proxy_leaves_no_garbage_that_needs_collecting(stream: bool) -> None:
    """The gateway collects rarely, and what requests leave until then is memory that nobody uses."""
    behaviour = streams(EVENT, b"data: [DONE]\n\n") if stream else answers

    async def run() -> None:
        async with Engine(behaviour).serving() as engine, serve_gateway(url=engine.url) as gateway:
            found = []
            for _ in range(2):  # what the first request sets up stays
                gc.collect()
                for _ in range(20):
                    async with gateway.post(ASK | {"stream": stream}) as answer:
                        assert await answer.read()
                found.append(gc.collect())
            assert found[1] < 20

    gc.disable()
    try:
        asyncio.run(run())
    finally:
        gc.enable()


def test_proxy_without_descriptors_answers_503_and_keeps_the_pool() -> None:
    """That this process can open no connection says nothing about the engine, which must not be replaced for it."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            reader, writer = await asyncio.open_connection("127.0.0.1", URL(gateway.url).port)
            body = json.dumps(ASK).encode()
            with no_descriptors():
                writer.write(HEAD.format(len(body)).encode() + body)
                status = await asyncio.wait_for(reader.readline(), 5)
                text = await asyncio.wait_for(reader.readuntil(b"}}"), 5)
            assert (status.split()[1], b'"too_many_connections"' in text) == (b"503", True)
            assert b"retry-after: 1" in text.lower()
            async with gateway.post(ASK) as answer:
                assert answer.status == 200
            assert gateway.pools["tiny"].wakes == 1
            writer.close()

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
    opened: list[Connections] = []

    def recorded() -> Connections:
        opened.append(open_connections())
        return opened[-1]

    monkeypatch.setattr("service.gateway.app.open_connections", recorded)

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
                        head = HEAD.format(len(body))
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
            await eventually(lambda: len(asyncio.all_tasks()) <= before + opened[0].idle)
            assert opened[0].idle <= 100

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
                head = HEAD.format(len(body))
                client.sendall(head.encode() + body)
                await eventually(lambda: written > 0)
                before = -1
                while written != before:  # until it stands still
                    before = written
                    await asyncio.sleep(0.2)
            assert written < 32 * 1024 * 1024  # the kernel's buffers of two connections

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_proxy_stream_that_is_silent_gets_comments_between_its_events(path: str) -> None:
    """A long prompt, the engine's queue, a tool call that is buffered: proxies close what is silent for a minute."""
    cut = EVENT.index(b"\xc3") + 1
    ping = rb"event: ping\ndata: .*\n" if path == "/v1/messages" else b""
    comment, event = rb"(: waiting for tiny on H100, \d s\n" + ping + rb"\n)", re.escape(EVENT)
    one, two = comment + b"*" + event + comment + b"+", event + comment + b"+"

    async def run() -> None:
        commented = [asyncio.Event(), asyncio.Event()]

        async def pauses(request: Request, writer: asyncio.StreamWriter) -> None:
            del request
            writer.write(STREAM + chunk(EVENT))
            await commented[0].wait()
            writer.write(chunk(EVENT[:cut]))
            await asyncio.sleep(0.2)
            writer.write(chunk(EVENT[cut:]))
            await commented[1].wait()
            writer.write(chunk(b""))

        async with (
            asyncio.timeout(20),
            Engine(pauses).serving() as engine,
            serve_gateway(url=engine.url, comment_interval_s=0.05) as gateway,
            gateway.post(STREAMED, path) as answer,
        ):
            assert answer.headers["X-Accel-Buffering"] == "no"
            assert answer.headers.getall("Cache-Control") == ["no-cache"]
            text = b""
            for expected, seen in zip((one, one + two), commented, strict=True):
                while not re.fullmatch(expected, text):
                    text += await answer.content.readany()
                seen.set()
            assert re.fullmatch(one + two, text + await answer.content.read())

    asyncio.run(run())


def test_proxy_answer_that_is_no_stream_gets_no_comments() -> None:
    """Neither where none was asked for nor where the engine refuses to make one."""

    async def slowly(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        await answers(request, writer)

    async def run() -> None:
        async with (
            Engine(slowly).serving() as engine,
            serve_gateway(url=engine.url, comment_interval_s=0.05) as gateway,
            gateway.post(ASK) as answer,
        ):
            assert (await answer.json())["id"] == "x"
            assert "X-Accel-Buffering" not in answer.headers

    asyncio.run(run())
