"""The gateway as an ASGI application: authenticates a request, then forwards it to an engine or answers it itself."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.routing import Router

from service.gateway.api_errors import APIError, find_route, unauthorized
from service.gateway.catalog import Catalog
from service.gateway.clients import ClientRegistry
from service.gateway.grammars import Grammars
from service.gateway.inference import Inference
from service.gateway.metrics import Metrics, RequestLog
from service.gateway.proxy import COMMENT_INTERVAL_S, Message, Receive, Send
from service.gateway.router import ModelRouter
from service.gateway.upstream import open_session
from service.in_engine.vllm_service import http_contract
from service.in_engine.vllm_service.http_contract import JSON

_MODEL = re.compile(rb"(?:^|&)model=.")
_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_log = logging.getLogger(__name__)


class Gateway:
    """ASGI application; `create_app` makes it.

    Args:
        clients: Whom it serves.
        inference: The routes that an engine answers.
        catalog: The routes that the gateway answers itself, and the lifespan.
        metrics: Counts and logs requests.
    """

    def __init__(self, clients: ClientRegistry, inference: Inference, catalog: Router, metrics: Metrics) -> None:
        self._clients, self._inference, self._catalog, self._metrics = clients, inference, catalog, metrics

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request; errors have the shape of its path's protocol."""
        if scope["type"] == "lifespan":
            await self._catalog(scope, receive, send)
        elif scope["type"] != "http":
            await receive()
            await send({"type": "websocket.close", "code": 4404})
        elif http_contract.is_open(http_contract.routes_at(scope["path"])):
            await self._answer_without_key(scope, receive, send)
        else:
            await self._answer_and_count(scope, receive, send)

    async def _answer_without_key(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            find_route(scope["method"], scope["path"])
        except APIError as error:
            await _send_error(error, _new_log(scope), send)
        else:
            await self._catalog(scope, receive, send)

    async def _answer_and_count(self, scope: Message, receive: Receive, send: Send) -> None:
        log = _new_log(scope)
        self._metrics.begin()
        try:
            await self._authenticate_and_answer(scope, receive, send, log)
        except APIError as error:
            await _send_error(error, log, send)
        except ConnectionError:  # the server closes the connection, so the client sees an incomplete answer
            log.status, log.code = 502, "engine_lost"
            raise
        except Exception:
            if log.status:
                raise
            _log.exception("request %s failed", log.id)
            message = f"The gateway failed at this request. Its log has the reason under request id {log.id}."
            await _send_error(APIError(500, message, kind="server_error"), log, send)
        finally:
            self._metrics.end(log)

    async def _authenticate_and_answer(self, scope: Message, receive: Receive, send: Send, log: RequestLog) -> None:
        client = self._clients.authenticate(scope["headers"])
        if client is None:
            raise unauthorized()
        log.key = client.name
        api_route = find_route(scope["method"], scope["path"])
        if api_route.model_from and (not api_route.is_own_without_model or _names_model(scope)):
            await self._inference.serve(api_route, scope, receive, send, client=client, log=log)
        else:
            await self._catalog(scope, receive, _recording(send, log))


def create_app(
    router: ModelRouter,
    clients: ClientRegistry,
    metrics: Metrics,
    *,
    hold_s: float,
    comment_interval_s: float = COMMENT_INTERVAL_S,
    grammars: Grammars | None = None,
) -> Gateway:
    """Return the gateway to the models of a router.

    Args:
        router: Finds the pool of a model.
        clients: Whom it serves.
        metrics: Counts and logs requests; the pools report their wakes to it.
        hold_s: How long a request that is no stream waits for a pool.
        comment_interval_s: Seconds between the comments of a waiting stream.
        grammars: Checks structured outputs; default: without the engine's library.
    """
    grammars = grammars or Grammars()

    @asynccontextmanager
    async def lifespan(_: Router) -> AsyncIterator[dict[str, object]]:
        async with open_session() as http:
            yield {"http": http}
            await grammars.close()

    catalog = Router(Catalog(router, metrics).routes(), redirect_slashes=False, lifespan=lifespan)
    return Gateway(clients, Inference(router, grammars, hold_s, comment_interval_s), catalog, metrics)


def _names_model(scope: Message) -> bool:
    return bool(scope["method"] == "GET" and _MODEL.search(scope["query_string"]))


def _new_log(scope: Message) -> RequestLog:
    return RequestLog(_request_id(scope), scope["method"], scope["path"])


def _request_id(scope: Message) -> str:
    """Return the id that the client gave its request, or a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _ID.fullmatch(value):
            return str(value.decode())
    return secrets.token_hex(16)


def _recording(send: Send, log: RequestLog) -> Send:
    """Return a `send` that records the answer in the log and adds the request's id to its headers."""

    async def send_recorded(message: Message) -> None:
        if message["type"] == "http.response.start":
            log.status = message["status"]
            message["headers"] = [*message["headers"], (b"x-request-id", log.id.encode())]
        else:
            log.record_chunk(message.get("body", b""))
        await send(message)

    return send_recorded


async def _send_error(error: APIError, log: RequestLog, send: Send) -> None:
    log.status, log.code = error.status, error.code
    if log.client_left:
        return
    body = error.body(log.path)
    headers = {
        "content-type": JSON,
        "content-length": str(len(body)),
        "x-request-id": log.id,
        **error.headers,
    }
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    log.record_chunk(body)
    await send({"type": "http.response.body", "body": body})
