"""Clients that keep their connections: pauses shorter and longer than the server keeps an idle connection."""

from __future__ import annotations

import asyncio
import http.client
import json
import select
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

import aiohttp
import httpx2
import uvloop

from service.engine.args import KEEP_ALIVE_S
from service.gateway import upstream
from service.gateway.http_server.limits import Limits
from tests.gateway.upstream import Engine, answers, serve_gateway

CONNECTIONS = 64  # of each client
KEPT = Limits(keep_alive_s=2)
PAUSES_S = (0, 1, 2, 3)
PATH = "/v1/chat/completions"
BODY = json.dumps({"model": "tiny", "messages": []}).encode()
JSON = {"Content-Type": "application/json"}
THREADS, SENDING = ThreadPoolExecutor(CONNECTIONS), threading.Lock()
Post = Callable[[], Awaitable[int]]


async def pause_and_post(post: Post, began: float, number: int) -> list[int]:
    """Post with pauses up to 3 s; return the statuses.

    Idle connections are closed at whole seconds after `began`. Clients look whether a connection is closed some time
    before they send, if at all, and no server can help a request that crosses the close; so none is sent then.
    """
    found = []
    for pause_s in PAUSES_S[number % 4 :] + PAUSES_S[: number % 4]:
        await asyncio.sleep(pause_s - 0.5)
        while wait_s := until_between_closes(began, number):  # noqa: ASYNC110 - it is a time
            await asyncio.sleep(wait_s)
        found.append(await post())
    return found


def until_between_closes(began: float, number: int) -> float:
    """Return how long to wait until no connection is about to be closed; 0: it is so now."""
    after_close_s = (time.monotonic() - began) % 1
    return 0 if 0.1 < after_close_s < 0.5 else (0.2 + 0.2 * number / (3 * CONNECTIONS) - after_close_s) % 1


class Pooled:
    """A connection of `http.client`, replaced where the server has closed it, as urllib3 does."""

    def __init__(self, port: int, began: float) -> None:
        self._began = began
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)

    def close(self) -> None:
        """Close it."""
        self._connection.close()

    async def post(self) -> int:
        """Post in a thread."""
        return await asyncio.get_running_loop().run_in_executor(THREADS, self._post)

    def _post(self) -> int:
        connection = self._connection
        with SENDING:  # 64 threads that wait for the interpreter would send long after they looked
            while wait_s := until_between_closes(self._began, 0):
                time.sleep(wait_s)
            if connection.sock and select.select([connection.sock], [], [], 0)[0]:
                connection.close()
            connection.request("POST", PATH, BODY, JSON)
        with connection.getresponse() as answer:
            answer.read()
            return answer.status


@contextmanager
def served() -> Iterator[tuple[str, float]]:
    """Serve a gateway from a thread, since clients have other loops than their server; yield its URL and the time."""
    opened: Future[tuple[str, float]] = Future()
    ended = threading.Event()

    async def serve() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url, limits=KEPT) as gateway:
            opened.set_result((gateway.url, time.monotonic()))
            await asyncio.to_thread(ended.wait)

    with ThreadPoolExecutor(1) as thread:
        serving = thread.submit(uvloop.run, serve())
        try:
            yield opened.result(10)
        finally:
            ended.set()
        serving.result()


def test_pooled_connections_with_pauses_never_fail() -> None:
    """Those of aiohttp, httpx and `http.client`; the server keeps them for 2 s, and pauses last up to 3 s."""

    async def run(stack: ExitStack, gateway: str, began: float) -> None:
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
            httpx2.AsyncClient(limits=httpx2.Limits(max_connections=None)) as client,
        ):
            url = gateway + PATH

            async def by_aiohttp() -> int:
                async with session.post(url, data=BODY, headers=JSON) as answer:
                    await answer.read()
                    return answer.status

            async def by_httpx() -> int:
                return (await client.post(url, content=BODY, headers=JSON)).status_code

            port = int(gateway.rpartition(":")[2])
            pooled = [stack.enter_context(closing(Pooled(port, began))) for _ in range(CONNECTIONS)]
            posts = [post for one in pooled for post in (by_aiohttp, by_httpx, one.post)]
            found = await asyncio.gather(*(pause_and_post(post, began, number) for number, post in enumerate(posts)))
        assert found == [[200] * len(PAUSES_S)] * len(posts)

    with served() as (url, began), ExitStack() as stack:
        asyncio.run(run(stack, url, began))


def test_connection_within_the_kept_time_is_used_again() -> None:
    """The second request comes on the same connection."""

    async def run() -> None:
        async with serve_gateway(limits=KEPT) as gateway:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.rpartition(":")[2]))
            for _ in range(2):
                writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert b'{"status":"ok"}' in await reader.readuntil(b"}")
                await asyncio.sleep(1.5)
            writer.close()

    asyncio.run(run())


def test_connection_to_an_engine_is_dropped_before_the_engine_does() -> None:
    """A request on a connection that the engine is about to close would be lost, or sent twice."""

    async def run() -> None:
        async with upstream.open_connections() as connections:
            assert connections.kept_s == KEEP_ALIVE_S - 15

    asyncio.run(run())
