"""Web endpoints: one loopback port per web function or web method, as Modal gives each a URL of its own.

Turns a request into an input of a pool and the pool's output into a response. Parameters in the query choose the pool.
Proxy auth is checked before a container starts. Bodies stream both ways, and the plane buffers a bounded number of
bytes of each. A client that disconnects becomes `http.disconnect`. A request without a first byte after
`redirect_after_s` is answered 303 with a URL that waits for the same response. Of websockets only the handshake is
forwarded; it waits for its container without a limit.

Not supported: custom domains.

The first endpoints get ports that are reserved when the plane starts. So a container reaches the web functions of other
apps under the plane's URLs, however early the container booted.
"""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiohttp import web
from grpclib import GRPCError, Status
from modal._serialization import (
    apply_defaults,
    serialize,
    serialize_proto_params,
    validate_parameter_values,
)
from modal.exception import InvalidError
from modal_proto import api_pb2 as pb

from . import websockets
from .calls import Calls, FunctionCall
from .faults import CALL_QUERY, Faults
from .proxy_tokens import ProxyTokens
from .web import Exchange, pass_on, responses, scope, send_body, send_disconnect

if TYPE_CHECKING:
    from .functions import Function, Functions

RESERVED_PORTS = 8  # Modal's free plan has this many web endpoints per workspace
REQUEST_AHEAD_BYTES = 64 * 2**20  # read ahead of the container; beyond it a client's disconnect is not noticed
RESPONSE_AHEAD_BYTES = 2**20
_COERCIONS: dict[int, Callable[[str], object]] = {
    pb.PARAM_TYPE_STRING: str,
    pb.PARAM_TYPE_INT: int,
    pb.PARAM_TYPE_BYTES: str.encode,
}
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


@dataclass
class WebEndpoint:
    """The port of one web function or web method; a redeploy keeps it."""

    socket: socket.socket
    url: str
    runner: web.AppRunner | None = None


class WebEndpoints:
    """All web endpoints."""

    def __init__(self) -> None:
        self.proxy_tokens = ProxyTokens()
        self.redirect_after_s = 150.0
        self.faults: dict[str, Faults] = {}
        self._answered: list[tuple[str, str, int] | None] = []
        self._endpoints: dict[tuple[str, str], WebEndpoint] = {}
        self._reserved = [_bound_socket() for _ in range(RESERVED_PORTS)]
        self.functions: Functions
        self.calls: Calls

    @property
    def requests(self) -> list[tuple[str, str, int]]:
        """(method, path with query, status) of every completed request, in order of arrival."""
        return [answered for answered in self._answered if answered]

    def url(self, function_id: str, method: str, webhook: pb.WebhookConfig) -> str:
        """Return the URL of a web method; empty for one that is not served over HTTP."""
        return self._endpoint(function_id, method).url if webhook.type else ""

    def _endpoint(self, function_id: str, method: str) -> WebEndpoint:
        key = (function_id, method)
        if key not in self._endpoints:
            bound = self._reserved.pop(0) if self._reserved else _bound_socket()
            self._endpoints[key] = WebEndpoint(bound, f"http://127.0.0.1:{bound.getsockname()[1]}")
        return self._endpoints[key]

    @property
    def ports(self) -> list[int]:
        """Ports of all endpoints and the reserved ones; a container reaches no endpoint that later opens on another."""
        sockets = [*(endpoint.socket for endpoint in self._endpoints.values()), *self._reserved]
        return [bound.getsockname()[1] for bound in sockets]

    async def open(self, function_id: str, method: str, webhook: pb.WebhookConfig) -> str:
        """Serve the web method; return its URL."""
        if webhook.custom_domains:
            raise GRPCError(Status.UNIMPLEMENTED, "The modal plane for tests does not support custom domains.")
        endpoint = self._endpoint(function_id, method)
        if endpoint.runner is None:

            async def handle(request: web.Request) -> web.StreamResponse:
                return await self._handle(request, function_id, method)

            application = web.Application()
            application.router.add_route("*", "/{path:.*}", handle)
            endpoint.runner = web.AppRunner(
                application, handler_cancellation=True, access_log=None, shutdown_timeout=0.1
            )
            await endpoint.runner.setup()
            await web.SockSite(endpoint.runner, endpoint.socket).start()
        return endpoint.url

    async def close(self) -> None:
        for endpoint in self._endpoints.values():
            if endpoint.runner is not None:
                await endpoint.runner.cleanup()
            endpoint.socket.close()
        for bound in self._reserved:
            bound.close()

    async def _handle(self, request: web.Request, function_id: str, method: str) -> web.StreamResponse:
        exchange = Exchange(request)
        number = len(self._answered)
        self._answered.append(None)
        try:
            response = await self._answer(exchange, function_id, method)
            exchange.status = response.status
            return response
        finally:
            self._answered[number] = (request.method, request.path_qs, exchange.status)

    async def _answer(self, exchange: Exchange, function_id: str, method: str) -> web.StreamResponse:
        request = exchange.request
        function = self.functions.find(function_id)
        if function is None:
            return _error(404, "the web endpoint is no longer deployed")
        if function.app.state == pb.APP_STATE_STOPPED:
            return _error(404, "app for invoked web endpoint is stopped")
        if unauthorized := self._check_proxy_auth(request, function, method):
            return unauthorized
        if (faults := self.faults.get(function.app.name)) and (faulty := await faults.answer(request)):
            return faulty
        if waiting := request.query.get(CALL_QUERY):
            return await self._respond(exchange, self.calls.call(waiting))
        return await self._call(exchange, function, method)

    async def _call(self, exchange: Exchange, function: Function, method: str) -> web.StreamResponse:
        request = exchange.request
        is_websocket = websockets.is_handshake(request)
        if is_websocket and not websockets.is_well_formed(request):
            return _error(400, "not the handshake of a websocket")
        try:
            pool = self._pool(function, request)
        except (InvalidError, ValueError) as error:
            return _error(400, str(error))
        call = self.calls.create(pool, pb.FUNCTION_CALL_INVOCATION_TYPE_SYNC)
        call.data_in.bound(REQUEST_AHEAD_BYTES)
        call.data_out.bound(RESPONSE_AHEAD_BYTES)
        if is_websocket:
            return await self._connect(exchange, call, method)
        upload = asyncio.ensure_future(send_body(request, call))
        upload.add_done_callback(_retrieve_exception)
        self._submit(call, scope(request), method)
        try:
            return await self._respond(exchange, call, upload)
        finally:
            upload.cancel()

    def _submit(self, call: FunctionCall, described: dict[str, object], method: str) -> None:
        args = serialize(((described,), {}))
        item = pb.FunctionInput(args=args, data_format=pb.DATA_FORMAT_PICKLE, method_name=method)
        self.calls.submit(call, item, is_web=True)

    async def _connect(self, exchange: Exchange, call: FunctionCall, method: str) -> web.StreamResponse:
        websockets.send_connect(call)
        self._submit(call, websockets.scope(exchange.request), method)
        try:
            first = await anext(responses(call), None)
            return _no_response(call) if first is None else websockets.answer(first)
        finally:
            self._disconnect(call, functools.partial(websockets.send_disconnect, call))

    def _check_proxy_auth(self, request: web.Request, function: Function, method: str) -> web.StreamResponse | None:
        definition = function.definition
        webhook = definition.method_definitions[method].webhook_config if method else definition.webhook_config
        if webhook.requires_proxy_auth and not self.proxy_tokens.admit(request):
            return _error(401, "missing credentials for proxy authorization")
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

    async def _respond(
        self, exchange: Exchange, call: FunctionCall, upload: asyncio.Future[None] | None = None
    ) -> web.StreamResponse:
        messages = responses(call)
        try:
            try:
                async with asyncio.timeout(self.redirect_after_s):
                    first = await anext(messages, None)
            except TimeoutError:
                return await self._redirect(exchange, call, upload)
            if first is None:
                return _no_response(call)
            response = await pass_on(exchange, call, first, messages)
        except (asyncio.CancelledError, ConnectionResetError):
            self._disconnect(call, functools.partial(send_disconnect, call))
            raise
        call.data_in.discard()
        call.data_out.discard()
        return response

    async def _redirect(
        self, exchange: Exchange, call: FunctionCall, upload: asyncio.Future[None] | None
    ) -> web.StreamResponse:
        if upload is not None:  # the connection ends with the response, so the rest of the body is read first
            call.data_in.bound(None)
            await asyncio.wait([upload])
        location = exchange.request.url.update_query({CALL_QUERY: call.id})
        return web.Response(status=303, headers={"Location": str(location)})

    def _disconnect(self, call: FunctionCall, notify: Callable[[], None]) -> None:
        """Handle a client's disconnect: notify the container, or cancel an input that no container has taken."""
        queued = call.inputs[0]
        if queued.task is None:
            self.calls.cancel(call)
        elif not queued.is_done:
            notify()


def _bound_socket() -> socket.socket:
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    return bound


def _error(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=f"modal-http: {text}\n")


def _no_response(call: FunctionCall) -> web.Response:
    return _error(500, call.outputs[0].result.exception or "the function returned no response")


def _coerce(parameter: pb.ClassParameterSpec, text: str) -> object:
    if parameter.type == pb.PARAM_TYPE_BOOL:
        if text.lower() not in _BOOLEANS:
            raise ValueError(f"parameter {parameter.name!r}={text!r} is not a boolean")
        return _BOOLEANS[text.lower()]
    return _COERCIONS[parameter.type](text)


def _retrieve_exception(upload: asyncio.Future[None]) -> None:
    """Retrieve the exception of an interrupted body: the client left, which `_respond` notices too."""
    if not upload.cancelled():
        upload.exception()
