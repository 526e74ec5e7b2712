"""The gateway in front of a faulty Modal: requests of clients, and what became of each.

`Edge` stands for Modal's proxy and one pool behind it: it has the faults of `tests/fakes/modal/faults.py`, boots a
replica when a request comes while there is none, and counts what reaches the engine.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

from service.gateway.app import create_app
from service.gateway.clients import ClientRegistry
from service.gateway.metrics import Metrics
from service.gateway.router import ModelRouter
from service.gateway.tiers import Tiers
from service.registry.models import Registry
from service.settings import Settings
from tests.fakes.modal.faults import Faults
from tests.gateway.upstream import serving

MODEL = "qwen3-8b"
BROKEN = "broken"  # an answer that is neither whole nor an error
_EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'


@dataclass
class Edge:
    """Modal's proxy, and a pool of one replica.

    Attributes:
        faults: Of the proxy.
        boot_s: How long a boot takes.
        lives: How many requests a replica answers before it ends, and the pool is cold.
        reached: How often each request reached the engine, by its id.
        boots: How many replicas were started.
        checks, most_checks: Health checks at this moment, and the most at once.
    """

    faults: Faults
    boot_s: float
    lives: int
    reached: Counter[str] = field(default_factory=Counter)
    boots: int = 0
    checks: int = 0
    most_checks: int = 0
    _booting: asyncio.Future[None] | None = None
    _left: int = 0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Serve it on loopback and return its URL."""
        application = web.Application(client_max_size=2**20)
        application.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(application, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        is_check = request.path == "/health"
        self.checks += is_check
        self.most_checks = max(self.most_checks, self.checks)
        try:
            if faulty := await self.faults.answer(request):
                return faulty
            if request.method == "POST":
                await request.read()
            await self._replica()
            if is_check:
                return web.json_response({"status": "ok"}, headers={"x-max-model-len": "4096"})
            return await self._generate(request)
        except ConnectionError:  # a late reset
            return web.Response(status=500)
        finally:
            self.checks -= is_check

    async def _replica(self) -> None:
        """Wait for the replica; start one where there is none."""
        if self._left <= 0 and self._booting is None:
            self.boots += 1
            self._booting = asyncio.ensure_future(asyncio.sleep(self.boot_s))
        if self._booting:
            booting = self._booting
            await asyncio.shield(booting)
            if self._booting is booting:
                self._booting, self._left = None, self.lives

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        self._left -= 1
        self.reached[request.headers["X-Request-Id"]] += 1
        body = json.loads(await request.read())
        await asyncio.sleep(0.02)
        if not body.get("stream"):
            return web.json_response({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(3):
            await response.write(_EVENT)
            await asyncio.sleep(0.02)
        await response.write(b"data: [DONE]\n\n")
        return response


@dataclass
class Outcomes:
    """What became of the requests: `answered`, `broken`, or the code of an error; and the seconds that each took."""

    codes: Counter[str]
    seconds: list[float]
    edge: Edge


async def run(requests: int, *, seed: int, share: float = 0.3, at_once: int = 50, boot_s: float = 0.2) -> Outcomes:
    """Send requests through a gateway to a faulty edge, and return what became of them.

    Args:
        requests: How many.
        seed: Of all that is random.
        share: Of the requests that get a fault, at the edge.
        at_once: How many clients there are.
        boot_s: How long a boot takes.
    """
    edge = Edge(Faults(seed, share), boot_s, lives=max(20, requests // 10))
    codes: Counter[str] = Counter()
    seconds: list[float] = []
    draw = random.Random(seed)  # noqa: S311 - no secret
    registry = Registry.load()
    settings = Settings.model_validate({"app": "team", "scaledown_window": 2})
    tiers = Tiers(settings, {"Modal-Key": "x"})
    router = ModelRouter(registry, MODEL, tiers.pool)
    app = create_app(router, ClientRegistry({}), Metrics(), hold_s=120, comment_interval_s=5)
    async with edge.serving() as url, serving(app) as gateway, aiohttp.ClientSession() as http:

        async def located(command: str) -> str:
            del command
            return url

        tiers.pool(registry.specs[MODEL], None)._tier.url = located  # type: ignore[method-assign]
        numbers = iter(range(requests))

        async def client() -> None:
            for number in numbers:
                began = time.monotonic()
                code, _ = await ask(http, gateway, f"request-{number}", streams=draw.random() < 0.5)
                codes[code] += 1
                seconds.append(time.monotonic() - began)
                await asyncio.sleep(draw.uniform(0, 0.02))

        await asyncio.gather(*(client() for _ in range(at_once)))
    return Outcomes(codes, seconds, edge)


async def ask(
    http: aiohttp.ClientSession, gateway: str, number: str, model: str = MODEL, *, streams: bool
) -> tuple[str, float]:
    """Send a request; return `answered`, `broken`, or the code of its error, and for how long not to ask again."""
    body = {"model": model, "messages": [{"role": "user", "content": "x"}], "stream": streams, "max_tokens": 8}
    try:
        async with http.post(f"{gateway}/v1/chat/completions", json=body, headers={"X-Request-Id": number}) as answer:
            text = await answer.read()
    except (aiohttp.ClientError, ConnectionError):
        return BROKEN, 0.0
    if answer.status != 200:
        code = str(json.loads(text)["error"]["code"])
        if "Retry-After" in answer.headers:
            return code, float(answer.headers["Retry-After"])
        return (code, 5.0) if answer.headers.get("x-should-retry") == "false" else (BROKEN, 0.0)
    if not streams:
        return ("answered" if "choices" in json.loads(text) else BROKEN), 0.0
    if not text.endswith(b"data: [DONE]\n\n"):
        return BROKEN, 0.0
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith(b"data: {")]
    return next(((str(event["error"]["code"]), 1.0) for event in events if "error" in event), ("answered", 0.0))
