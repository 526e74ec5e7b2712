"""The door: who comes in, and which of the routes it is. `gateway` makes the ASGI application."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.routing import Router

from service.gateway.api_errors import Refusal, find_route, unauthorized
from service.gateway.catalog import Catalog
from service.gateway.clients import Keyring
from service.gateway.grammars import Grammars
from service.gateway.inference import Inference
from service.gateway.metrics import Account, Metrics
from service.gateway.proxy import HEARTBEAT_S, Message, Receive, Send
from service.gateway.router import Directory
from service.gateway.upstream import session
from service.in_engine.vllm_service import http_contract
from service.in_engine.vllm_service.http_contract import JSON

_MODEL = re.compile(rb"(?:^|&)model=.")
_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_log = logging.getLogger(__name__)


class Door:
    """ASGI application.

    Args:
        keyring: Who may come in.
        inference: The routes that reach an engine.
        catalog: All other routes, and the lifespan.
        metrics: What is counted.
    """

    def __init__(self, keyring: Keyring, inference: Inference, catalog: Router, metrics: Metrics) -> None:
        self._keyring, self._inference, self._catalog, self._metrics = keyring, inference, catalog, metrics

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request; every refusal has OpenAI's shape."""
        if scope["type"] == "lifespan":
            await self._catalog(scope, receive, send)
        elif scope["type"] != "http":
            await receive()
            await send({"type": "websocket.close", "code": 4404})
        elif http_contract.is_open(http_contract.routes_at(scope["path"])):
            await self._answer_openly(scope, receive, send)
        else:
            await self._counted(scope, receive, send)

    async def _answer_openly(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            find_route(scope["method"], scope["path"])
        except Refusal as refusal:
            await _answer(refusal, _account(scope), send)
        else:
            await self._catalog(scope, receive, send)

    async def _counted(self, scope: Message, receive: Receive, send: Send) -> None:
        account = _account(scope)
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
        route = find_route(scope["method"], scope["path"])
        if route.model_from and (not route.is_own_without_model or _names_model(scope)):
            await self._inference.serve(route, scope, receive, send, client=client, account=account)
        else:
            await self._catalog(scope, receive, _noting(send, account))


def gateway(
    directory: Directory,
    keyring: Keyring,
    metrics: Metrics,
    *,
    hold_s: float,
    heartbeat_s: float = HEARTBEAT_S,
    grammars: Grammars | None = None,
) -> Door:
    """Return the door to the models of a directory.

    Args:
        directory: Which pool a name stands for.
        keyring: Who may come in.
        metrics: Counts requests; the pools tell it of their wakes.
        hold_s: How long a request that is no stream waits for a pool.
        heartbeat_s: Seconds between the comments of a waiting stream.
        grammars: Compiles what an output is to be like; default: without the engine's library.
    """
    grammars = grammars or Grammars()

    @asynccontextmanager
    async def lifespan(_: Router) -> AsyncIterator[dict[str, object]]:
        async with session() as http:
            yield {"http": http}
            await grammars.close()

    catalog = Router(Catalog(directory, metrics).routes(), redirect_slashes=False, lifespan=lifespan)
    return Door(keyring, Inference(directory, grammars, hold_s, heartbeat_s), catalog, metrics)


def _names_model(scope: Message) -> bool:
    return bool(scope["method"] == "GET" and _MODEL.search(scope["query_string"]))


def _account(scope: Message) -> Account:
    return Account(_request_id(scope), scope["method"], scope["path"])


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
