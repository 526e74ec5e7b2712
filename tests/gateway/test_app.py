"""Every request: its key, its id, its path and its method."""

from __future__ import annotations

import asyncio
import json

import pytest

from service.gateway.clients import ClientRegistry
from tests.gateway.upstream import ALICE, ASK, KEYS, Engine, answers, serve_gateway

UNKNOWN = [{"Authorization": "Bearer stale"}, {"x-api-key": "stale"}, {"api-key": "stale"}]


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/chat/completions", "/v1/nope", "/console"])
def test_gateway_without_a_key_is_401_on_every_route(path: str) -> None:
    """The error has OpenAI's shape and says how to send a key."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS)) as gateway:
            for headers in (*UNKNOWN, {}, {"x-api-key": ""}, {"Authorization": "Basic a-key"}):
                async with gateway.http.get(gateway.url + path, headers=headers) as answer:
                    assert answer.status == 401
                    assert answer.headers["WWW-Authenticate"] == "Bearer"
                    assert (await answer.json())["error"]["code"] == "invalid_api_key"

    asyncio.run(run())


def test_gateway_refuses_a_request_without_a_key_before_its_body() -> None:
    """The body of an unauthenticated request is not read."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS)) as gateway:
            host, port = gateway.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n")
            async with asyncio.timeout(2):
                assert b"401" in await reader.readline()
            writer.close()

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/health", "/docs", "/docs/page.js", "/openapi.json", "/", "/console/main.js"])
def test_gateway_open_routes_need_no_key_and_wake_nothing(path: str) -> None:
    """A request to them costs nothing."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS)) as gateway:
            async with gateway.http.get(gateway.url + path) as answer:
                assert answer.status == 200
                assert await answer.read()
            assert all(pool.wakes == 0 for pool in gateway.pools.values())

    asyncio.run(run())


def test_request_id_that_is_invalid_is_replaced() -> None:
    """An id that is written to logs is printable and short."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            async with gateway.post(ASK, headers={"X-Request-Id": "x" * 129}) as answer:
                assert len(answer.headers["x-request-id"]) == 32
            assert engine.requests[0].headers["x-request-id"] == answer.headers["x-request-id"]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "allow"), [("/v1/models", "GET, HEAD"), ("/health", "GET, HEAD"), ("/v1/responses/resp_1", "GET")]
)
def test_method_that_is_not_allowed_is_405_with_those_that_are(path: str, allow: str) -> None:
    """HEAD works where the gateway answers itself, and is forwarded to no engine."""

    async def run() -> None:
        async with serve_gateway() as gateway:
            async with gateway.http.delete(gateway.url + path) as answer:
                assert (answer.status, answer.headers["Allow"]) == (405, allow)
            async with gateway.http.head(gateway.url + path) as answer:
                assert answer.status == (200 if "HEAD" in allow else 405)

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/v1/chat/completions/", "//v1/chat/completions", "/v1//chat/completions"])
def test_path_with_one_slash_too_many_is_served(path: str) -> None:
    """The engine, the log and the counters get the path as the API has it."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            async with gateway.post(ASK, path) as answer:
                assert answer.status == 200
            assert engine.requests[0].line.split()[1].partition("?")[0] == "/v1/chat/completions"
            assert json.loads(gateway.lines[0])["path"] == "/v1/chat/completions"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/messages", "/v1/messages"),
        ("/api/v1/messages/count_tokens", "/v1/messages/count_tokens"),
        ("/models", "/v1/models"),
        ("/v1/audio/speech", None),
    ],
)
def test_unknown_path_is_404_with_the_one_meant_and_the_base_url(path: str, meant: str | None) -> None:
    """A wrong base URL is the first mistake of a new user: the error says which one is right."""

    async def run() -> None:
        async with serve_gateway() as gateway, gateway.post(ASK, path, allow_redirects=False) as answer:
            assert answer.status == 404
            message = (await answer.json())["error"]["message"]
            assert path in message
            assert f"The base URL is {gateway.url}/v1 for OpenAI's clients and {gateway.url} for" in message
            assert ("Did you mean" in message) is (meant is not None)
            assert meant is None or f"Did you mean {meant}?" in message

    asyncio.run(run())


def test_base_url_in_an_error_has_the_scheme_of_the_proxy_in_front() -> None:
    """A proxy that ends TLS says so; other values are no scheme."""

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS)) as gateway:
            for given, scheme in (("https", "https"), ("javascript", "http")):
                headers = ALICE | {"Host": "llm.example", "X-Forwarded-Proto": given}
                async with gateway.http.get(gateway.url + "/nope", headers=headers) as answer:
                    message = (await answer.json())["error"]["message"]
                assert f" {scheme}://llm.example/v1 for OpenAI's clients" in message

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions", "/v1/models"])
def test_websocket_handshake_is_426(path: str) -> None:
    """Codex tries a websocket first; this status makes it go on over HTTP at once."""
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", **ALICE}

    async def run() -> None:
        async with serve_gateway(ClientRegistry(KEYS)) as gateway:
            async with gateway.http.get(gateway.url + path, headers=headers) as answer:
                assert answer.status == 426
                assert answer.headers["Upgrade"] == "HTTP/1.1"
                assert "Upgrade" in answer.headers.getall("Connection")
                assert (await answer.json())["error"]["code"] == "upgrade_required"
            assert all(pool.wakes == 0 for pool in gateway.pools.values())

    asyncio.run(run())
