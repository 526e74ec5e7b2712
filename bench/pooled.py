"""Clients that keep their connections, with pauses between their requests.

Each connection has a client of its own, so that its idle times are the pauses. They are shorter than the service keeps
an idle connection by default; a second service keeps it for half of the longest pause, and closes most connections.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import select
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import httpx2

from bench.gateway_candidates import running
from bench.processes import free_port, service

CONNECTIONS = 64  # of each client
PAUSE_S = 90.0
CLOSED_AFTER_S = 45  # by the second service
_ANSWER_S = 60.0
_PATH = "/v1/completions"
_BODY = json.dumps({"model": "tiny", "prompt": "One", "max_tokens": 1}).encode()
_JSON = {"Content-Type": "application/json"}
_NODE = Path(__file__).with_suffix(".mjs")

Pauses = Sequence[float]
Post = Callable[[], Awaitable[int]]


@dataclass
class Done:
    """What became of the requests of one client."""

    requests: int = 0
    failures: list[str] = field(default_factory=list)


def run(seconds: float, seed: int) -> dict[str, Done]:
    """Serve the tiny model twice, and return what became of the requests of each client; blocks."""
    rng = random.Random(seed)  # noqa: S311 - no secret
    state = Path(tempfile.mkdtemp())
    with ExitStack() as stack:
        by_default = _serve(state / "default", stack)
        closing = _serve(state / "closing", stack, SERVICE_KEEP_ALIVE_S=str(CLOSED_AFTER_S))
        done = asyncio.run(_all_clients({"": by_default, f", closed after {CLOSED_AFTER_S} s": closing}, seconds, rng))
    if any(client.failures for client in done.values()):
        print(f"The logs of the services stay in {state}.")
    else:
        shutil.rmtree(state)
    return done


def _serve(state: Path, stack: ExitStack, **settings: str) -> str:
    """Serve until the stack closes; return the URL of completions."""
    state.mkdir()
    port = free_port()
    settings |= {"XDG_STATE_HOME": str(state), "SERVICE_PORT": str(port)}
    stack.enter_context(running("up", service(port), state / "up.log", f"http://127.0.0.1:{port}/health", **settings))
    return f"http://127.0.0.1:{port}{_PATH}"


async def _all_clients(urls: dict[str, str], seconds: float, rng: random.Random) -> dict[str, Done]:
    clients = {"aiohttp": _aiohttp, "httpx": _httpx, "http.client": _http_client, "Node's fetch": _node}
    work = {
        name + kind: client(url, [_pauses(seconds, rng) for _ in range(CONNECTIONS)], seconds)
        for kind, url in urls.items()
        for name, client in clients.items()
    }
    return dict(zip(work, await asyncio.gather(*work.values()), strict=True))


def _pauses(seconds: float, rng: random.Random) -> list[float]:
    pauses: list[float] = []
    while sum(pauses) < seconds:
        pauses.append(round(rng.uniform(0, PAUSE_S), 3))
    return pauses


async def _aiohttp(url: str, pauses: Sequence[Pauses], seconds: float) -> Done:
    async def one(of_connection: Pauses) -> Done:
        connector = aiohttp.TCPConnector(limit=1, keepalive_timeout=2 * PAUSE_S)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def post() -> int:
                async with session.post(url, data=_BODY, headers=_JSON) as answer:
                    await answer.read()
                    return answer.status

            return await _pause_and_post(post, of_connection, seconds)

    return _sum(await asyncio.gather(*map(one, pauses)))


async def _httpx(url: str, pauses: Sequence[Pauses], seconds: float) -> Done:
    async def one(of_connection: Pauses) -> Done:
        limits = httpx2.Limits(max_connections=1, keepalive_expiry=None)
        async with httpx2.AsyncClient(limits=limits, timeout=_ANSWER_S) as client:

            async def post() -> int:
                return (await client.post(url, content=_BODY, headers=_JSON)).status_code

            return await _pause_and_post(post, of_connection, seconds)

    return _sum(await asyncio.gather(*map(one, pauses)))


async def _http_client(url: str, pauses: Sequence[Pauses], seconds: float) -> Done:
    threads, loop = ThreadPoolExecutor(CONNECTIONS), asyncio.get_running_loop()

    async def one(of_connection: Pauses) -> Done:
        connection = http.client.HTTPConnection("127.0.0.1", urlsplit(url).port, timeout=_ANSWER_S)

        def post() -> int:
            if connection.sock and select.select([connection.sock], [], [], 0)[0]:
                connection.close()  # the server has closed it; urllib3 looks in the same way
            connection.request("POST", _PATH, _BODY, _JSON)
            with connection.getresponse() as answer:
                answer.read()
                return answer.status

        done = await _pause_and_post(lambda: loop.run_in_executor(threads, post), of_connection, seconds)
        connection.close()
        return done

    return _sum(await asyncio.gather(*map(one, pauses)))


async def _node(url: str, pauses: Sequence[Pauses], seconds: float) -> Done:
    node = shutil.which("node")
    if node is None:
        sys.exit("Node is not in PATH: install Node 20.")
    arguments = [str(_NODE), url, _BODY.decode(), str(CONNECTIONS), str(seconds), json.dumps(pauses)]
    process = await asyncio.create_subprocess_exec(node, *arguments, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    return Done(**json.loads(output))


async def _pause_and_post(post: Post, pauses: Pauses, seconds: float) -> Done:
    done, began = Done(), time.monotonic()
    for pause_s in pauses:
        if time.monotonic() + pause_s > began + seconds:
            break
        await asyncio.sleep(pause_s)
        done.requests += 1
        try:
            status = await post()
        except (aiohttp.ClientError, httpx2.HTTPError, http.client.HTTPException, OSError) as error:
            done.failures.append(f"{error!r} after {pause_s:g} s, at {time.monotonic() - began:.1f} s")
        else:
            if status != 200:
                done.failures.append(f"status {status} after {pause_s:g} s, at {time.monotonic() - began:.1f} s")
    return done


def _sum(parts: Sequence[Done]) -> Done:
    return Done(sum(part.requests for part in parts), [failure for part in parts for failure in part.failures])
