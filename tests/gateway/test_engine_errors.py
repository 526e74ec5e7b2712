"""Engines that answer with an error or break off: what the client gets, and what is logged."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest

from tests.engine.routes import error_of
from tests.gateway.upstream import (
    ASK,
    STREAM,
    STREAMED,
    Engine,
    Request,
    answers,
    chunk,
    eventually,
    refuses,
    serve_gateway,
    streams,
)

EVENT = b'data: {"choices":[{"delta":{"content":"caf\xc3\xa9"}}]}\n\n'


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


def test_proxy_body_that_breaks_off_before_its_first_byte_is_an_error() -> None:
    """The status has not been passed on then, so the client gets an error that it can repeat the request after."""

    async def breaks(request: Request, writer: asyncio.StreamWriter) -> None:
        del request
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    async def run() -> None:
        async with (
            Engine(breaks).serving() as engine,
            serve_gateway(url=engine.url) as gateway,
            gateway.post(ASK) as answer,
        ):
            assert (answer.status, (await answer.json())["error"]["code"]) == (502, "engine_lost")

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("body", [ASK, STREAMED])
def test_proxy_error_of_the_engine_has_the_shape_of_its_route(path: str, body: dict[str, object]) -> None:
    """Status, code and type are this API's, on a pool that is ready; the sentence is the engine's."""

    async def run() -> None:
        async with (
            Engine(refuses(400, {"message": "Too many.", "param": "body.n"})).serving() as engine,
            serve_gateway(url=engine.url) as gateway,
            gateway.post(body, path) as answer,
        ):
            error = error_of(await answer.read(), path)
            assert (answer.status, error["type"], error["message"]) == (400, "invalid_request_error", "Too many.")
            assert path == "/v1/messages" or (error["code"], error["param"]) == ("invalid_value", "n")
            assert answer.headers.get("request-id") == (answer.headers["x-request-id"] if "code" not in error else None)

    asyncio.run(run())


def test_proxy_failure_of_the_engine_is_502_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """The client learns no internals; the log has them under the request's id."""

    async def run() -> None:
        async with (
            Engine(refuses(500, {"message": "'list' object has no attribute 'get'"})).serving() as engine,
            serve_gateway(url=engine.url) as gateway,
            gateway.post(ASK, headers={"x-request-id": "abc"}) as answer,
        ):
            text = await answer.text()
            assert (answer.status, error_of(text.encode())["code"]) == (502, "engine_error")
            assert answer.headers["x-should-retry"] == "false"
            assert "attribute" not in text
            assert json.loads(gateway.lines[0])["code"] == "engine_error"

    asyncio.run(run())
    (line,) = [record.getMessage() for record in caplog.records if record.name == "service.gateway.proxy"]
    assert line.startswith("request abc: the engine of 'tiny' answered 500: ")
    assert "no attribute 'get'" in line


def test_proxy_error_of_the_engine_keeps_its_time_to_retry() -> None:
    """A replica that is shutting down says when to come back."""

    async def run() -> None:
        behaviour = refuses(503, {"message": "Shutting down.", "code": "shutting_down"}, **{"retry-after": "5"})
        async with (
            Engine(behaviour).serving() as engine,
            serve_gateway(url=engine.url) as gateway,
            gateway.post(ASK) as answer,
        ):
            assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
            assert error_of(await answer.read())["code"] == "shutting_down"
            assert "x-should-retry" not in answer.headers

    asyncio.run(run())


def test_proxy_stream_that_the_engine_ends_with_an_error_is_logged_as_one(caplog: pytest.LogCaptureFixture) -> None:
    """Its status was 200; counters and request log have what it would have been."""
    event = b'data: {"error": {"message": "Gone.", "code": "engine_lost", "status": 502}}\n\ndata: [DONE]\n\n'

    async def run() -> None:
        async with (
            Engine(streams(EVENT, event)).serving() as engine,
            serve_gateway(url=engine.url) as gateway,
            gateway.post(STREAMED) as answer,
        ):
            assert await answer.content.read() == EVENT + event
            line = json.loads(gateway.lines[0])
            assert (line["status"], line["code"]) == (502, "engine_lost")

    asyncio.run(run())
    assert sum("answered 502: Gone." in message for message in caplog.messages) == 1


@pytest.mark.parametrize("status", [401, 404, 429, 500, 503])
def test_proxy_error_of_a_proxy_in_between_is_a_lost_engine(status: int, caplog: pytest.LogCaptureFixture) -> None:
    """Modal's proxy speaks plain text: a stopped app is not the client's 404. The next request looks again."""

    async def between(request: Request, writer: asyncio.StreamWriter) -> None:
        del request
        writer.write(
            f"HTTP/1.1 {status} X\r\ncontent-type: text/plain\r\ncontent-length: 11\r\n\r\nmodal-http:".encode()
        )
        await writer.drain()

    async def run() -> None:
        async with (
            Engine(between).serving() as engine,
            serve_gateway(url=engine.url) as gateway,
            gateway.post(ASK) as answer,
        ):
            assert (answer.status, answer.headers["Retry-After"]) == (502, "1")
            assert error_of(await answer.read())["code"] == "engine_lost"
            assert gateway.pools["tiny"].endpoint() is None

    asyncio.run(run())
    assert sum(f"answered {status}: modal-http:" in message for message in caplog.messages) == 1
