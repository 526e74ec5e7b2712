"""The door: who comes in, and which of the routes it is. `gateway` makes the ASGI application."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.gateway import catalog
from service.gateway.api_errors import JSON, Refusal, unauthorized
from service.gateway.clients import Keyring
from service.gateway.grammars import Grammars
from service.gateway.inference import Inference
from service.gateway.metrics import Account, Metrics
from service.gateway.proxy import HEARTBEAT_S, Message, Receive, Send
from service.gateway.router import Directory
from service.gateway.routes import INFERENCE, OPEN
from service.gateway.upstream import session

_RESPONSE = re.compile(r"/v1/responses/[A-Za-z0-9_-]+")
_RESPONSE_CANCEL = re.compile(r"/v1/responses/[A-Za-z0-9_-]+/cancel")
_MODEL = re.compile(rb"(?:^|&)model=.")
_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_log = logging.getLogger(__name__)


class Door:
    """ASGI application.

    Args:
        keyring: Who may come in.
        inference: The routes that reach an engine.
        others: All other routes, and the lifespan.
        metrics: What is counted.
    """

    def __init__(self, keyring: Keyring, inference: Inference, others: Starlette, metrics: Metrics) -> None:
        self._keyring, self._inference, self._others, self._metrics = keyring, inference, others, metrics

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request; every refusal has OpenAI's shape."""
        if scope["type"] == "lifespan":
            await self._others(scope, receive, send)
        elif scope["type"] != "http":
            await receive()
            await send({"type": "websocket.close", "code": 4404})
        elif scope["path"] in OPEN:
            await self._others(scope, receive, send)
        else:
            await self._counted(scope, receive, send)

    async def _counted(self, scope: Message, receive: Receive, send: Send) -> None:
        account = Account(_request_id(scope), scope["method"], scope["path"])
        self._metrics.begin()
        try:
            await self._admitted(scope, receive, send, account)
        except Refusal as refusal:
            await _answer(refusal, account, send)
        except ConnectionError:  # the server closes the connection: nothing else tells that the answer is not whole
            account.status, account.code = 502, "engine_lost"
            raise
        except Exception:
            if account.status:
                raise
            _log.exception("request %s failed", account.id)
            failed = Refusal(500, "The gateway failed at this request; its log says why.", kind="server_error")
            await _answer(failed, account, send)
        finally:
            self._metrics.end(account)

    async def _admitted(self, scope: Message, receive: Receive, send: Send, account: Account) -> None:
        client = self._keyring.find(scope["headers"])
        if client is None:
            raise unauthorized()
        account.key = client.name
        if _reaches_an_engine(scope):
            await self._inference.serve(scope, receive, send, client, account)
        else:
            await self._others(scope, receive, _noting(send, account))


def gateway(
    directory: Directory,
    keyring: Keyring,
    *,
    hold_s: float,
    heartbeat_s: float = HEARTBEAT_S,
    grammars: Grammars | None = None,
    access: Callable[[str], None] | None = None,
) -> Door:
    """Return the door to the models of a directory.

    Args:
        directory: Which pool a name stands for.
        keyring: Who may come in.
        hold_s: How long a request that is no stream waits for a pool.
        heartbeat_s: Seconds between the comments of a waiting stream.
        grammars: Compiles what an output is to be like; default: without the engine's library.
        access: Takes one JSON line a request.
    """
    grammars = grammars or Grammars()
    metrics = Metrics(access)
    directory.on_woke = lambda pool, well: metrics.woke(pool.spec.key, well=well)
    inference = Inference(directory, grammars, hold_s, heartbeat_s)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with session() as inference.http:
            yield
            await grammars.close()

    async def health(_: Request) -> Response:
        return Response(b'{"status":"ok"}', media_type=JSON)

    async def models(_: Request) -> Response:
        return Response(await catalog.models(directory), media_type=JSON)

    async def counters(_: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def docs(_: Request) -> Response:
        return Response(catalog.docs(directory), media_type="text/html")

    async def openapi(_: Request) -> Response:
        return Response(catalog.openapi(), media_type=JSON)

    others = Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/metrics", counters),
            Route("/docs", docs),
            Route("/openapi.json", openapi),
            *(Route(path, _unreached, methods=["POST"]) for path in INFERENCE),
        ],
        exception_handlers={HTTPException: _not_here},
        lifespan=lifespan,
    )
    others.router.redirect_slashes = False
    return Door(keyring, inference, others, metrics)


def _reaches_an_engine(scope: Message) -> bool:
    method, path = scope["method"], scope["path"]
    if method == "POST":
        return path in INFERENCE or _RESPONSE_CANCEL.fullmatch(path) is not None
    if method != "GET":
        return False
    return _RESPONSE.fullmatch(path) is not None or bool(path == "/metrics" and _MODEL.search(scope["query_string"]))


async def _unreached(_: Request) -> Response:
    raise AssertionError("POST never comes here; the route is listed for its 405")


async def _not_here(request: Request, error: Exception) -> Response:
    """Put Starlette's 404 and 405 into OpenAI's shape."""
    assert isinstance(error, HTTPException)  # noqa: S101 - it is what this handler is for
    path = request.url.path
    if error.status_code == 404:
        refusal = Refusal(404, f"No route {path}. What this service has is listed at /docs.", kind="not_found_error")
    else:
        allowed = (error.headers or {}).get("Allow", "")
        refusal = Refusal(error.status_code, f"{request.method} is not allowed on {path}; use {allowed}.")
    return Response(refusal.body(), refusal.status, headers=error.headers, media_type=JSON)


def _request_id(scope: Message) -> str:
    """Return the id that the client gave its request, or a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _ID.fullmatch(value):
            return str(value.decode())
    return secrets.token_hex(16)


def _noting(send: Send, account: Account) -> Send:
    async def noting(message: Message) -> None:
        if message["type"] == "http.response.start":
            account.status = message["status"]
            message["headers"] = [*message["headers"], (b"x-request-id", account.id.encode())]
        else:
            account.took(message.get("body", b""))
        await send(message)

    return noting


async def _answer(refusal: Refusal, account: Account, send: Send) -> None:
    account.status, account.code = refusal.status, refusal.code
    if account.left:
        return
    body = refusal.body(account.path)
    headers = {
        "content-type": JSON,
        "content-length": str(len(body)),
        "x-request-id": account.id,
        **refusal.headers,
    }
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    account.took(body)
    await send({"type": "http.response.body", "body": body})
