"""The gateway as an ASGI application: authenticates a request, then forwards it to an engine or answers it itself."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

from starlette.routing import Route, Router

from service.gateway import console, docs_page
from service.gateway.admin import Admin
from service.gateway.api_client import ApiClient
from service.gateway.catalog import Catalog
from service.gateway.clients import ClientRegistry
from service.gateway.gauges import KeyGauges, PoolGauges
from service.gateway.held import HeldRequests
from service.gateway.inference import Inference
from service.gateway.live_config import LiveConfig
from service.gateway.metrics import Metrics, RequestLog
from service.gateway.origins import OriginPolicy, is_preflight
from service.gateway.own_requests import OwnRequests
from service.gateway.pool_status import PoolStatus
from service.gateway.request_fields import MAX_N
from service.gateway.router import ModelRouter
from service.gateway.threads import in_thread
from service.gateway.upstream import open_connections
from service.gateway.usage_report import UsageReport
from service.in_engine.vllm_service import api_error, http_contract
from service.in_engine.vllm_service.api_error import APIError, Message, Receive, Send
from service.in_engine.vllm_service.http_contract import ApiRoute
from service.in_engine.vllm_service.stream_comments import INTERVAL_S
from service.usage.database import open_database

if TYPE_CHECKING:
    from service.gateway.spans import Tracing

_MODEL = re.compile(rb"(?:^|&)model=.")
_log = logging.getLogger(__name__)


class Extension(Protocol):
    """Routes of a package above this one, and what they need beside the gateway."""

    def routes(self) -> list[Route]:
        """Return the routes as Starlette has them."""

    async def run(self, requests: OwnRequests) -> None:
        """Work beside the gateway, until it is cancelled."""


class Gateway:
    """ASGI application; `create_app` makes it.

    Args:
        clients: Whom it serves.
        inference: The routes that an engine answers.
        catalog: The routes that the gateway answers itself, and the lifespan.
        metrics: Counts and logs requests.
        origins: What pages of other origins may do.
        config: What may change while it serves.
        tracing: Makes spans of the requests that an engine answers; None: nothing does.
    """

    def __init__(
        self,
        clients: ClientRegistry,
        inference: Inference,
        catalog: Router,
        metrics: Metrics,
        origins: OriginPolicy,
        *,
        config: LiveConfig | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.config = config
        self._tracing = tracing
        self._clients, self._inference, self._catalog, self._metrics = clients, inference, catalog, metrics
        self._origins = origins

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request; errors have the shape of its path's protocol."""
        if scope["type"] == "lifespan":
            await self._catalog(scope, receive, send)
        elif scope["type"] != "http":
            await api_error.refuse_websocket(scope, receive, send)
        elif is_preflight(scope):
            await self._origins.answer_preflight(scope, send)
        else:
            scope["path"] = http_contract.canonical_path(scope["path"])
            send = self._origins.with_headers(scope, send)
            if http_contract.is_open(http_contract.routes_at(scope["path"])):
                await self._answer_without_key(scope, receive, send)
            else:
                log = _new_log(scope)
                await self._count(send, log, self._authenticate_and_answer(scope, receive, send, log))

    async def _answer_without_key(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            self._check_origin(scope)
            _find_route(scope)
            await self._catalog(scope, receive, send)
        except APIError as error:
            await _send_error(error, _new_log(scope), send)

    async def answer_own(self, client: ApiClient, scope: Message, receive: Receive, send: Send) -> RequestLog:
        """Answer a line of a batch, and return its entry in the request log.

        Raises:
            ConnectionError: The answer broke off.
        """
        log = _new_log(scope)
        log.is_batch = True
        await self._count(send, log, self._answer_client(client, scope, receive, send, log))
        return log

    async def _count(self, send: Send, log: RequestLog, answering: Coroutine[Any, Any, None]) -> None:
        self._metrics.begin(log)
        try:
            await answering
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
            await _send_error(APIError(500, message), log, send)
        finally:
            self._metrics.end(log)
            if log.trace:
                log.trace.end()
                log.trace = None  # they refer to each other, and garbage is collected rarely

    async def _authenticate_and_answer(self, scope: Message, receive: Receive, send: Send, log: RequestLog) -> None:
        self._check_origin(scope)
        client = self._clients.authenticate(scope["headers"])
        if client is None:
            raise self._clients.unknown()
        await self._answer_client(client, scope, receive, send, log)

    async def _answer_client(
        self, client: ApiClient, scope: Message, receive: Receive, send: Send, log: RequestLog
    ) -> None:
        log.key = client.name
        client.check_valid()
        api_route = _find_route(scope)
        if api_route.admin and not client.is_admin:
            raise APIError(403, f"{scope['path']} is for admin keys, and '{client.name}' is none.", code="admin_only")
        if api_route.model_from and (not api_route.is_own_without_model or _names_model(scope)):
            if self._tracing:
                log.trace = self._tracing.begin(scope, api_route, log)
            try:
                await self._inference.serve(api_route, scope, receive, send, client=client, log=log)
            except APIError as error:
                error.headers |= {name.decode(): value.decode() for name, value in client.rate_headers(scope["path"])}
                raise
        else:
            scope["state"]["client"], scope["state"]["log"] = client, log  # who may see what
            await self._catalog(scope, receive, _recording(send, log))

    def _check_origin(self, scope: Message) -> None:
        if not self._clients.needs_key:
            self._origins.check_local(scope)


def create_app(
    router: ModelRouter,
    clients: ClientRegistry,
    metrics: Metrics,
    *,
    hold_s: float,
    comment_interval_s: float = INTERVAL_S,
    max_n: int = MAX_N,
    origins: OriginPolicy | None = None,
    config: LiveConfig | None = None,
    watch: Callable[[], Coroutine[Any, Any, None]] | None = None,
    held: HeldRequests | None = None,
    tracing: Tracing | None = None,
    extension: Extension | None = None,
) -> Gateway:
    """Return the gateway to the models of a router.

    Args:
        router: Finds the pool of a model.
        clients: Whom it serves.
        metrics: Counts and logs requests; the pools report their wakes to it. Its ledger writes while the app runs.
        hold_s: How long a request that is no stream waits for a pool.
        comment_interval_s: How long a stream may be silent before it gets a comment.
        max_n: The most answers to one request.
        origins: What pages of other origins may do; default: nothing.
        config: Keys, limits and models that may change while it serves; None: they do not.
        watch: Runs beside it, until it ends.
        held: The requests that are held; default: with the default limits.
        tracing: Makes spans of the requests that an engine answers; None: nothing does.
        extension: Further routes; None: this gateway has no files and batches.
    """
    pool_status = PoolStatus(router)

    @asynccontextmanager
    async def lifespan(_: Router) -> AsyncIterator[dict[str, object]]:
        beside = [asyncio.create_task(config.watch(), name="watch keys and limits")] if config else []
        beside += [asyncio.create_task(watch(), name="watch prices and spending")] if watch else []
        if metrics.ledger:
            metrics.ledger.start()
        try:
            async with open_connections() as http:
                if extension:
                    requests = OwnRequests(gateway.answer_own, clients, {"http": http})
                    beside.append(asyncio.create_task(extension.run(requests), name="batches"))
                try:
                    yield {"http": http}
                finally:
                    await _cancel(beside)
        finally:
            await pool_status.close()
            if metrics.ledger:
                await in_thread(metrics.ledger.close)
            if tracing:
                await in_thread(tracing.close)

    held = held or HeldRequests()
    metrics.watch(PoolGauges(router, pool_status, held), KeyGauges(clients))
    usage = UsageReport(metrics.ledger.connect if metrics.ledger else open_database)
    catalog_routes = [*console.routes(clients), *docs_page.routes(clients), *Catalog(router, metrics, usage).routes()]
    own_routes = [*catalog_routes, *Admin(config).routes(), *pool_status.routes()]
    own_routes += extension.routes() if extension else []
    catalog = Router(own_routes, redirect_slashes=False, default=_no_extension, lifespan=lifespan)
    inference = Inference(router, hold_s, comment_interval_s, max_n, held)
    gateway = Gateway(clients, inference, catalog, metrics, origins or OriginPolicy(), config=config, tracing=tracing)
    return gateway


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _no_extension(scope: Message, _receive: Receive, _send: Send) -> None:
    raise api_error.no_route(scope["path"], http_contract.base_url(scope))


def _find_route(scope: Message) -> ApiRoute:
    """Return the route of a request.

    Raises:
        APIError: 404, 405, or 426 for a websocket's handshake: there is none.
    """
    method, path = scope["method"], scope["path"]
    routes = http_contract.routes_at(path)
    if not routes:
        raise api_error.no_route(path, http_contract.base_url(scope))
    if method == "GET" and http_contract.is_websocket(scope["headers"]):
        raise api_error.no_websocket(path)
    allowed = dict(routes)
    if (get := routes.get("GET")) and (get.model_from is None or get.is_own_without_model):
        allowed["HEAD"] = get  # HEAD is not forwarded
    if method not in allowed:
        raise api_error.not_allowed(method, path, allowed)
    return allowed[method]


def _names_model(scope: Message) -> bool:
    return bool(scope["method"] == "GET" and _MODEL.search(scope["query_string"]))


def _new_log(scope: Message) -> RequestLog:
    return RequestLog(http_contract.request_id_of(scope["headers"]), scope["method"], scope["path"])


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

    async def send_recorded(message: Message) -> None:
        if "body" in message:
            log.record_chunk(message["body"])
        await send(message)

    await error.send(log.path, log.id, send_recorded)
