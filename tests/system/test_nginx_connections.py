"""Connections and bodies between nginx and the gateway, and of clients that are refused while they write."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest

from service.gateway.http_server.limits import Limits
from service.gateway.uploads import UploadLimits, Uploads
from tests.gateway.upstream import STREAM, Engine, Request, answers, chunk, serve_gateway

from . import programs
from .nginx import Nginx

PATH = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
ASK = {"model": "tiny", "messages": []}
BODY = json.dumps(ASK).encode()
EVENT = b"data: 1\n\n"
TOO_LARGE = 40_000_000  # bytes; the gateway takes 32 MiB
KEPT_S, NGINX_KEPT_S = 4, 3  # as 75 s and nginx's 60 s
CONNECTIONS, REQUESTS = 16, 4  # each with pauses up to KEPT_S + 1 between its requests


def test_stream_through_nginx_arrives_event_by_event(tmp_path: Path) -> None:
    """Nginx buffers answers, unless they say that it should not."""
    received = asyncio.Event()

    async def waits(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM + chunk(EVENT))
        await received.wait()
        writer.write(chunk(EVENT) + chunk(b""))

    async def run() -> None:
        async with Engine(waits).serving() as engine, serve_gateway(url=engine.url) as gateway:
            with Nginx(tmp_path, port_of(gateway.url)) as nginx:
                async with gateway.http.post(nginx.url + PATH, json={**ASK, "stream": True}) as answer:
                    assert await asyncio.wait_for(answer.content.readuntil(b"\n\n"), 5) == EVENT
                    received.set()
                    assert await answer.content.read() == EVENT

    asyncio.run(run())


def test_nginx_that_keeps_connections_never_meets_a_closed_one(tmp_path: Path) -> None:
    """It keeps them for less time than the gateway does, and repeats no POST."""
    rng = random.Random(7)  # noqa: S311 - no secret

    async def run() -> None:
        async with (
            Engine(answers).serving() as engine,
            serve_gateway(url=engine.url, limits=Limits(keep_alive_s=KEPT_S)) as gateway,
        ):
            keeps = f"keepalive {CONNECTIONS}; keepalive_timeout {NGINX_KEPT_S}s;"
            with Nginx(tmp_path, port_of(gateway.url), upstreams=keeps) as nginx:

                async def pause_and_post() -> list[int]:
                    statuses = []
                    for _ in range(REQUESTS):
                        await asyncio.sleep(rng.uniform(0, KEPT_S + 1))
                        async with gateway.http.post(nginx.url + PATH, json=ASK) as answer:
                            await answer.read()
                            statuses.append(answer.status)
                    return statuses

                found = await asyncio.gather(*(pause_and_post() for _ in range(CONNECTIONS)))
                assert nginx.errors.count("[error]") == 0, nginx.errors
        assert found == [[200] * REQUESTS] * CONNECTIONS

    asyncio.run(run())


@pytest.mark.parametrize("buffering", ["on", "off"])
def test_body_over_the_limit_is_413_through_nginx(tmp_path: Path, buffering: str) -> None:
    """Nginx reads the whole body first, or hands it on while the client writes: the gateway's answer arrives."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            proxy = f"client_max_body_size 64m; proxy_request_buffering {buffering};"
            with Nginx(tmp_path, port_of(gateway.url), proxy=proxy) as nginx:
                async with gateway.http.post(
                    nginx.url + PATH, data=io.BytesIO(b"[" * TOO_LARGE), headers=JSON
                ) as answer:
                    assert (answer.status, (await answer.json())["error"]["code"]) == (413, "body_too_large")
            assert not engine.requests

    asyncio.run(run())


async def by_aiohttp(url: str, body: bytes) -> int:
    """Post with aiohttp, in chunks."""

    async def pieces() -> object:
        for begin in range(0, len(body), 65536):
            yield body[begin : begin + 65536]

    async with aiohttp.ClientSession() as session, session.post(url, data=pieces(), headers=JSON) as answer:
        await answer.read()
        return answer.status


async def by_http_client(url: str, body: bytes) -> int:
    """Post with the standard library, which writes everything before it reads."""

    def post() -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port_of(url), timeout=30)
        connection.request("POST", PATH, body, JSON)
        with connection.getresponse() as answer:
            answer.read()
            return answer.status

    return await asyncio.get_running_loop().run_in_executor(None, post)


async def by_curl(url: str, body: bytes) -> int:
    """Post with curl, which waits for `100 Continue` first where it may."""
    command = [
        programs.find("curl"),
        "--silent",
        "--show-error",
        "--output",
        "/dev/null",
        "--write-out",
        "%{http_code}",
    ]
    arguments = ["--header", "Content-Type: application/json", "--data-binary", "@-", url]
    pipe = asyncio.subprocess.PIPE
    curl = await asyncio.create_subprocess_exec(*command, *arguments, stdin=pipe, stdout=pipe, stderr=pipe)
    out, err = await curl.communicate(body)
    assert curl.returncode == 0, err
    return int(out)


@pytest.mark.parametrize("post", [by_aiohttp, by_http_client, by_curl])
def test_body_over_the_limit_is_413_for_a_client_that_still_writes(post: Callable[[str, bytes], object]) -> None:
    """None sees a reset connection in its place (RFC 9112, section 9.6)."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            assert await post(gateway.url + PATH, b"[" * TOO_LARGE) == 413

    asyncio.run(run())


def test_body_that_stalls_is_408_through_nginx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nginx hands on what has come, and the gateway's answer."""
    monkeypatch.setattr("service.gateway.inference.Uploads", lambda: Uploads(UploadLimits(piece_s=0.3, sweep_s=0.1)))

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            with Nginx(tmp_path, port_of(gateway.url), proxy="proxy_request_buffering off;") as nginx:
                reader, writer = await asyncio.open_connection("127.0.0.1", nginx.port)
                head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                writer.write(f"{head}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY[:5])
                status = await asyncio.wait_for(reader.readline(), 10)
                writer.close()
        assert status.startswith(b"HTTP/1.1 408 ")

    asyncio.run(run())


def port_of(url: str) -> int:
    """Return the port of a URL."""
    port = urlsplit(url).port
    assert port
    return port
