"""The HTTP front door: one loopback port per web method, as Modal gives each a URL of its own.

Owns the way from a request to an input and back: parameters in the query choose the pool, proxy auth refuses before a
container starts, bodies stream both ways, a client that leaves is passed on as `http.disconnect`, and a request without
a first byte after `redirect_after_s` is answered 303 to a URL that waits on. Refused: websockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiohttp import web
from modal._serialization import (
    apply_defaults,
    deserialize_data_format,
    serialize,
    serialize_proto_params,
    validate_parameter_values,
)
from modal.exception import InvalidError
from modal_proto import api_pb2 as pb

from .calls import Calls, FunctionCall
from .proxy_tokens import ProxyTokens

if TYPE_CHECKING:
    from .functions import Function, Functions

CALL_QUERY = "__modal_function_call_id"
CLIENT_LEFT = 499
HOP_BY_HOP = (b"transfer-encoding", b"connection", b"keep-alive")
_COERCIONS: dict[int, Callable[[str], object]] = {
    pb.PARAM_TYPE_STRING: str,
    pb.PARAM_TYPE_INT: int,
    pb.PARAM_TYPE_BYTES: str.encode,
}
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


@dataclass
class Site:
    """The port of one web method; it stays over redeploys."""

    socket: socket.socket
    url: str
    runner: web.AppRunner | None = None


@dataclass
class Exchange:
    """A request and the status of its answer, CLIENT_LEFT while that is not out."""

    request: web.Request
    status: int = CLIENT_LEFT


class Door:
    """All sites. `requests` keeps (method, path with query, status) of every answer."""

    def __init__(self) -> None:
        self.proxy_tokens = ProxyTokens()
        self.redirect_after_s = 150.0
        self.requests: list[tuple[str, str, int]] = []
        self._sites: dict[tuple[str, str], Site] = {}
        self.functions: Functions
        self.calls: Calls

    def url(self, function_id: str, method: str, webhook: pb.WebhookConfig) -> str:
        """Return the URL of a web method; empty for one that is not served over HTTP."""
        return self._site(function_id, method).url if webhook.type else ""

    def _site(self, function_id: str, method: str) -> Site:
        key = (function_id, method)
        if key not in self._sites:
            bound = socket.socket()
            bound.bind(("127.0.0.1", 0))
            self._sites[key] = Site(bound, f"http://127.0.0.1:{bound.getsockname()[1]}")
        return self._sites[key]

    async def open(self, function_id: str, method: str) -> str:
        """Serve the web method; return its URL."""
        site = self._site(function_id, method)
        if site.runner is None:

            async def handle(request: web.Request) -> web.StreamResponse:
                return await self._handle(request, function_id, method)

            application = web.Application()
            application.router.add_route("*", "/{path:.*}", handle)
            site.runner = web.AppRunner(application, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
            await site.runner.setup()
            await web.SockSite(site.runner, site.socket).start()
        return site.url

    async def close(self) -> None:
        for site in self._sites.values():
            if site.runner is not None:
                await site.runner.cleanup()
            site.socket.close()

    async def _handle(self, request: web.Request, function_id: str, method: str) -> web.StreamResponse:
        exchange = Exchange(request)
        try:
            response = await self._answer(exchange, function_id, method)
            exchange.status = response.status
            return response
        finally:
            self.requests.append((request.method, request.path_qs, exchange.status))

    async def _answer(self, exchange: Exchange, function_id: str, method: str) -> web.StreamResponse:
        request = exchange.request
        function = self.functions.find(function_id)
        if function is None:
            return _refusal(404, "the web endpoint is no longer deployed")
        if function.app.state == pb.APP_STATE_STOPPED:
            return _refusal(404, "app for invoked web endpoint is stopped")
        if refused := self._refuse(request, function, method):
            return refused
        if waiting := request.query.get(CALL_QUERY):
            return await self._relay(exchange, self.calls.call(waiting))
        try:
            pool = self._pool(function, request)
        except (InvalidError, ValueError) as error:
            return _refusal(400, str(error))
        call = self.calls.create(pool, pb.FUNCTION_CALL_INVOCATION_TYPE_SYNC)
        args = serialize(((_scope(request),), {}))
        item = pb.FunctionInput(args=args, data_format=pb.DATA_FORMAT_PICKLE, method_name=method)
        upload = asyncio.ensure_future(_send_body(request, call))
        upload.add_done_callback(_forget)
        self.calls.submit(call, item, is_web=True)
        try:
            return await self._relay(exchange, call)
        finally:
            upload.cancel()

    def _refuse(self, request: web.Request, function: Function, method: str) -> web.StreamResponse | None:
        definition = function.definition
        webhook = definition.method_definitions[method].webhook_config if method else definition.webhook_config
        if webhook.requires_proxy_auth and not self.proxy_tokens.admit(request):
            return _refusal(401, "missing credentials for proxy authorization")
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return _refusal(501, "the plane for tests passes no websockets")
        return None

    def _pool(self, function: Function, request: web.Request) -> Function:
        schema = function.definition.class_parameter_info.schema
        if not schema:
            return function
        given = {p.name: _coerce(p, request.query[p.name]) for p in schema if p.name in request.query}
        values = apply_defaults(given, schema)
        validate_parameter_values(values, schema)
        params = serialize_proto_params(values)
        return self.functions.bind(pb.FunctionBindParamsRequest(function_id=function.id, serialized_params=params))

    async def _relay(self, exchange: Exchange, call: FunctionCall) -> web.StreamResponse:
        messages = _responses(call)
        try:
            async with asyncio.timeout(self.redirect_after_s):
                first = await anext(messages, None)
        except TimeoutError:
            location = exchange.request.url.update_query({CALL_QUERY: call.id})
            return web.Response(status=303, headers={"Location": str(location)})
        except asyncio.CancelledError:
            self._leave(call)
            raise
        if first is None:
            return _refusal(500, call.outputs[0].result.exception or "the function returned no response")
        try:
            return await _pass_on(exchange, _start(first, call), messages)
        except (asyncio.CancelledError, ConnectionResetError):
            self._leave(call)
            raise

    def _leave(self, call: FunctionCall) -> None:
        """The client is gone: tell the container, or forget an input that no container took."""
        queued = call.inputs[0]
        if queued.task is None:
            self.calls.cancel(call)
        elif not queued.is_done:
            call.data_in.put(_chunk(pb.Asgi(http_disconnect=pb.Asgi.HttpDisconnect())))


async def _pass_on(
    exchange: Exchange, response: web.StreamResponse, messages: AsyncIterator[dict[str, Any]]
) -> web.StreamResponse:
    """Stream the response. A client may close once it has everything, so the status is noted before the last byte."""
    await response.prepare(exchange.request)
    left = response.content_length
    async for message in messages:
        body = message.get("body", b"")
        left = None if left is None else left - len(body)
        is_last = not message.get("more_body")
        if is_last or left == 0:
            exchange.status = response.status
        if body:
            await response.write(body)
        if is_last:
            await response.write_eof()
            return response
    if exchange.request.transport is not None:  # the container died: the client must not take it for the end
        exchange.request.transport.abort()
    return response


def _refusal(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=f"modal-http: {text}\n")


def _coerce(parameter: pb.ClassParameterSpec, text: str) -> object:
    if parameter.type == pb.PARAM_TYPE_BOOL:
        if text.lower() not in _BOOLEANS:
            raise ValueError(f"parameter {parameter.name!r}={text!r} is not a boolean")
        return _BOOLEANS[text.lower()]
    return _COERCIONS[parameter.type](text)


def _scope(request: web.Request) -> dict[str, object]:
    headers = [(name.lower().encode(), value.encode()) for name, value in request.headers.items()]
    return {
        "type": "http",
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "query_string": request.query_string.encode(),
        "headers": [(name, value) for name, value in headers if name not in HOP_BY_HOP],
        "client": ("127.0.0.1", 1),
    }


def _chunk(message: pb.Asgi) -> pb.DataChunk:
    return pb.DataChunk(data_format=pb.DATA_FORMAT_ASGI, data=message.SerializeToString())


def _forget(upload: asyncio.Future[None]) -> None:
    """Take note of a body that broke off: the client left, which the relay notices too."""
    if not upload.cancelled():
        upload.exception()


async def _send_body(request: web.Request, call: FunctionCall) -> None:
    """Pass the body on as it comes; the container waits 5 s for the first message, so an empty one leads."""
    if request.can_read_body:
        call.data_in.put(_chunk(pb.Asgi(http_request=pb.Asgi.HttpRequest(body=b"", more_body=True))))
        async for piece in request.content.iter_any():
            call.data_in.put(_chunk(pb.Asgi(http_request=pb.Asgi.HttpRequest(body=piece, more_body=True))))
    call.data_in.put(_chunk(pb.Asgi(http_request=pb.Asgi.HttpRequest(body=b"", more_body=False))))


async def _responses(call: FunctionCall) -> AsyncIterator[dict[str, Any]]:
    """Yield the ASGI messages of the response until the container says the last one, or dies."""
    chunks = call.data_out.after()
    while True:
        following = asyncio.ensure_future(anext(chunks))
        finished = asyncio.ensure_future(_settled(call))
        try:
            await asyncio.wait([following, finished], return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                return
            yield deserialize_data_format(following.result().data, pb.DATA_FORMAT_ASGI, None)
        finally:
            for waiting in (following, finished):
                waiting.cancel()
                with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                    await waiting


async def _settled(call: FunctionCall) -> None:
    while not call.outputs:
        await call.changed.wait()


def _start(message: dict[str, Any], call: FunctionCall) -> web.StreamResponse:
    response = web.StreamResponse(status=message["status"], headers={"Modal-Function-Call-Id": call.id})
    for name, value in message.get("headers", []):
        if name.lower() not in HOP_BY_HOP:
            response.headers.add(name.decode(), value.decode())
    return response
