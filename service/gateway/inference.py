"""The routes that an engine answers: reads a request's body, finds its model, checks its limits, and forwards it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qsl

from service.gateway import request_fields
from service.gateway.api_errors import APIError
from service.gateway.clients import ApiClient
from service.gateway.grammars import Grammars
from service.gateway.metrics import RequestLog
from service.gateway.proxy import COMMENT_INTERVAL_S, Message, ProxiedRequest, Receive, Send
from service.gateway.request_fields import RequestFields
from service.gateway.router import ModelRouter, Route
from service.gateway.upstream import UpstreamRequest
from service.in_engine.vllm_service import http_contract
from service.in_engine.vllm_service.http_contract import ApiRoute

_PIECE_S = 30.0
_QUERY = {"stream", "starting_after"}  # of GET /v1/responses/<id>
_LOCAL_DEFAULTS: dict[str, str | float] = {"temperature": 0.3, "tool_choice": "auto"}  # of names that end in `-local`


class Inference:
    """Answers these routes.

    Args:
        router: Finds the pool of a model.
        grammars: Checks structured outputs.
        hold_s: How long a request that is no stream waits for a pool.
        comment_interval_s: Seconds between the comments of a waiting stream.
    """

    def __init__(
        self,
        router: ModelRouter,
        grammars: Grammars,
        hold_s: float,
        comment_interval_s: float = COMMENT_INTERVAL_S,
    ) -> None:
        self._router, self._grammars = router, grammars
        self._hold_s, self._comment_interval_s = hold_s, comment_interval_s

    async def serve(
        self, api_route: ApiRoute, scope: Message, receive: Receive, send: Send, *, client: ApiClient, log: RequestLog
    ) -> None:
        """Answer one request. The lifespan put the connections to the engines into the state of `scope`, as `http`.

        Raises:
            APIError: Nothing has been sent yet, and the client must get this answer.
            ConnectionError: The answer broke off; the client's connection must end.
        """
        with client.request():
            body = await _read_body(api_route.body_limit, scope, receive, log)
            async with _while_client_stays(receive, log):
                route, request = await self._route(api_route, scope, body, client, log)
                del body
                proxied = ProxiedRequest(
                    scope["state"]["http"],
                    route.pool,
                    request,
                    log,
                    send,
                    hold_s=self._hold_s,
                    comment_interval_s=self._comment_interval_s,
                )
                await proxied.run()

    async def _route(
        self, api_route: ApiRoute, scope: Message, body: bytes | bytearray, client: ApiClient, log: RequestLog
    ) -> tuple[Route, UpstreamRequest]:
        path, query = scope["path"], dict(parse_qsl(scope["query_string"].decode("latin-1")))
        fields = request_fields.parse_fields(body) if api_route.model_from == "body" else None
        route = self._router.find(fields.model if fields else query.get("model"))
        log.model, log.pool = route.pool.spec.key, route.pool.location
        client.check_model(route.pool.spec.key, (fields and fields.model) or route.name)
        route.pool.check(route.name)
        passed = {name: value for name, value in query.items() if name in _QUERY and not fields}
        request = UpstreamRequest(scope["method"], path, passed, scope["headers"], body, b"", streams=False)
        if not fields and route.pool.endpoint() is None:  # the path reads what only a running engine has
            raise APIError(
                404,
                f"No engine of model '{log.model}' is running, and {path} reads what a running engine holds in memory. "
                f"Send a request to '{log.model}' first; what an earlier engine held is lost.",
            )
        if fields:
            request_fields.check_lists(path, body)
            await self._grammars.check(fields)
            request.streams = log.stream = bool(fields.stream) and api_route.streams
            if overrides := _overrides(fields, route):
                request.body, request.suffix = request_fields.with_overrides(body, overrides)
        return route, request


def _overrides(fields: RequestFields, route: Route) -> dict[str, str | float]:
    overrides: dict[str, str | float] = {} if route.is_exact_name else {"model": route.name}
    if route.local_defaults and fields.has_tools:
        overrides |= {name: value for name, value in _LOCAL_DEFAULTS.items() if not fields.sets(name)}
    return overrides


async def _read_body(limit: int, scope: Message, receive: Receive, log: RequestLog) -> bytes | bytearray:
    """Read a body of a bounded size, into one buffer."""
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    length = int(declared) if declared.isdigit() else limit + 1
    if length > limit:
        raise _too_large(limit)
    message = await receive()
    body: bytes | bytearray = message.get("body", b"")
    if message.get("more_body"):
        body = bytearray(body)  # grows with what arrives: the length that a client declares reserves no memory
        while message.get("more_body"):
            message = await _receive_more(receive)
            body += message.get("body", b"")
            if len(body) > limit:
                raise _too_large(limit)
    if message["type"] == "http.disconnect":
        log.client_left = True
        raise APIError(499, "The client left before its whole body had arrived.", code="client_left")
    log.bytes_in = len(body)
    return body


async def _receive_more(receive: Receive) -> Message:
    try:
        async with asyncio.timeout(_PIECE_S):
            return await receive()
    except TimeoutError:
        raise APIError(
            408,
            f"The body is incomplete, and no more of it arrived for {_PIECE_S:.0f} s. Send the whole request again.",
            code="body_too_slow",
        ) from None


def _too_large(limit: int) -> APIError:
    return APIError(413, http_contract.too_large(limit), code="body_too_large")


@asynccontextmanager
async def _while_client_stays(receive: Receive, log: RequestLog) -> AsyncIterator[None]:
    """Cancel the work inside when the client leaves; the request then ends without an error."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - a coroutine of a server runs in one
    watching = asyncio.ensure_future(_disconnected(receive))

    def leave(_: asyncio.Future[Any]) -> None:
        if not watching.cancelled():
            log.client_left = True
            task.cancel()

    watching.add_done_callback(leave)
    try:
        yield
    except asyncio.CancelledError:
        if not log.client_left:
            raise
        task.uncancel()
        log.status = log.status or 499
    finally:
        watching.remove_done_callback(leave)
        watching.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
