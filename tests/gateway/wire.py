"""Bytes on a connection to the server under the gateway, and applications behind it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.routing import Router

from service.gateway.http_server.limits import Limits
from tests.gateway.upstream import serving

GET = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /a HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
QUICK = Limits(keep_alive_s=0.5, first_byte_s=0.5, head_s=0.5, rest_s=0.5, linger_s=2.0, silence_s=0.5)
MIB = 1024 * 1024
Answering = Callable[[Any, Any, Any], Awaitable[None]]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with what the request was, once its body is here."""
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message["body"]
        if not message["more_body"]:
            break
    headers = [[name.decode(), value.decode("latin-1")] for name, value in scope["headers"]]
    found = {"path": scope["path"], "query": scope["query_string"].decode(), "method": scope["method"]}
    found |= {"headers": headers, "body": body.decode("latin-1"), "version": scope["http_version"]}
    await answer(send, json.dumps(found).encode())


async def answer(send: Any, body: bytes, status: int = 200, *headers: tuple[bytes, bytes]) -> None:
    """Send a whole answer."""
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [length, *headers]})
    await send({"type": "http.response.body", "body": body})


def with_lifespan(app: Answering) -> Answering:
    """Return the application with a lifespan, in which nothing happens."""

    async def both(scope: Any, receive: Any, send: Any) -> None:
        await (Router() if scope["type"] == "lifespan" else app)(scope, receive, send)

    return both


@asynccontextmanager
async def served(app: Answering = echo, limits: Limits | None = None) -> AsyncIterator[Wire]:
    """Serve an application; yield what opens connections to it."""
    async with serving(with_lifespan(app), limits) as url:
        yield Wire(int(url.rpartition(":")[2]))


class Wire:
    """Opens connections to a port of the loopback."""

    def __init__(self, port: int) -> None:
        self.port = port

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Open a connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def ask(self, *pieces: bytes, pause_s: float = 0.02) -> bytes:
        """Send pieces, and return everything that comes until the server closes or is silent for a second."""
        got = b""
        async with self.connection() as (reader, writer):
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(pause_s)
            try:
                async with asyncio.timeout(1):
                    while more := await reader.read(65536):
                        got += more
            except TimeoutError:
                pass
        return got


def statuses(got: bytes) -> list[int]:
    """Return the statuses of the answers on a connection."""
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d+) ", got)]


def echoed(got: bytes) -> Any:
    """Return what `echo` answered last."""
    return json.loads(got[got.rindex(b"\r\n\r\n") :])


def run(work: Callable[[Wire], Awaitable[None]], app: Answering = echo, limits: Limits | None = None) -> None:
    """Serve, and do this."""

    async def main() -> None:
        async with served(app, limits) as wire:
            await work(wire)

    asyncio.run(main())
