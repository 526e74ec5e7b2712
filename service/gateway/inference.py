"""The routes that an engine answers: reads a request's body, finds its model, checks its limits, and forwards it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

from service.gateway import constraints, request_fields
from service.gateway.api_client import ApiClient, RunningRequest
from service.gateway.fallback import Fallback, Target, is_allowed
from service.gateway.held import HeldRequests
from service.gateway.http_server.exchange import ON_LEAVE, WRITE_NOW
from service.gateway.metrics import RequestLog
from service.gateway.pool import Pool
from service.gateway.proxy import ProxiedRequest
from service.gateway.request_body import check_media_type, read_body
from service.gateway.request_fields import MAX_N, RequestFields
from service.gateway.router import ModelRouter, Route
from service.gateway.uploads import Uploads
from service.gateway.upstream import UpstreamRequest
from service.in_engine.vllm_service import engine_errors, form_data, media_urls, request_lists
from service.in_engine.vllm_service.api_error import APIError, Message, Receive, Send
from service.in_engine.vllm_service.http_contract import FORM, JSON, ApiRoute, header_of
from service.in_engine.vllm_service.overrides import with_overrides
from service.in_engine.vllm_service.stream_comments import INTERVAL_S
from service.registry.extra_args import media_hosts
from service.registry.models import ModelSpec

_CALLS = {"/v1/chat/completions", "/v1/messages"}  # routes on which vLLM refuses tools without a tool parser
_QUERY = {"stream", "starting_after"}  # of GET /v1/responses/<id>
_LOCAL_DEFAULTS: dict[str, str | float] = {"temperature": 0.3, "tool_choice": "auto"}  # of names that end in `-local`


class Inference:
    """Answers these routes.

    Args:
        router: Finds the pool of a model.
        hold_s: How long a request that is no stream waits for a pool.
        comment_interval_s: How long a stream may be silent before it gets a comment.
        max_n: The most answers to one request.
        held: The requests that are held; default: with the default limits.
    """

    def __init__(
        self,
        router: ModelRouter,
        hold_s: float,
        comment_interval_s: float = INTERVAL_S,
        max_n: int = MAX_N,
        held: HeldRequests | None = None,
    ) -> None:
        self._held = held or HeldRequests()
        self._router, self._hold_s, self._comment_interval_s, self._max_n = router, hold_s, comment_interval_s, max_n
        self._uploads = Uploads()

    async def serve(
        self, api_route: ApiRoute, scope: Message, receive: Receive, send: Send, *, client: ApiClient, log: RequestLog
    ) -> None:
        """Answer one request. The lifespan put the connections to the engines into the state of `scope`, as `http`.

        Raises:
            APIError: Nothing has been sent yet, and the client must get this answer.
            ConnectionError: The answer broke off; the client's connection must end.
        """
        log.is_usage = (
            scope["method"] != "GET"
        )  # scrapes of an engine's metrics are no work, and would be most requests
        with client.request(log) as running, self._uploads.track(client.name) as upload:
            if api_route.model_from == "body":
                check_media_type(scope["headers"], FORM if api_route.is_form else JSON)
            body = await read_body(api_route.body_limit, scope, receive, log, upload)
            async with _WhileClientStays(scope, receive, log):
                wanted, others = await self._targets(api_route, scope, body, client, running, log)
                del body

                forward = partial(self._forward, scope, client, log)
                if others:
                    await Fallback(wanted, others, forward, send, log=log, on_release=upload.release).run()
                else:
                    wanted.request.on_release = upload.release
                    await forward(wanted.pool, wanted.request, send)

    def _forward(  # noqa: PLR0917 - the last three are the forwarding's
        self, scope: Message, client: ApiClient, log: RequestLog, pool: Pool, request: UpstreamRequest, send: Send
    ) -> Coroutine[Any, Any, None]:
        return ProxiedRequest(
            scope["state"]["http"],
            pool,
            request,
            log,
            send,
            held=self._held,
            own_headers=partial(client.rate_headers, scope["path"]),
            hold_s=self._hold_s,
            comment_interval_s=self._comment_interval_s,
            write_now=scope.get("extensions", {}).get(WRITE_NOW),
        ).run()

    async def _targets(  # noqa: PLR0917 - every one is another part of the request
        self,
        api_route: ApiRoute,
        scope: Message,
        body: bytes | bytearray,
        client: ApiClient,
        running: RunningRequest,
        log: RequestLog,
    ) -> tuple[Target, list[Target]]:
        """Return the pool of the requested model, and those of the models that may answer in its place."""
        path, text = scope["path"], scope["query_string"]
        query = dict(parse_qsl(text.decode("latin-1"))) if text else {}
        fields, form = None, None
        if api_route.is_form:
            form = form_data.read(header_of(scope["headers"], b"content-type"), body, self._max_n)
            fields = request_fields.of_form(form)
        elif api_route.model_from == "body":
            fields = request_fields.parse_fields(body, self._max_n)
        route = self._router.find(fields.model if fields else query.get("model"))
        log.model, log.pool = route.pool.spec.key, route.pool.location
        client.check_model(route.pool.spec.key, (fields and fields.model) or route.name)
        self._check_task(api_route, path, route)
        route.pool.check(route.name)
        if not fields:
            if path == "/metrics" and not route.pool.may_be_read:
                raise APIError(
                    404,
                    f"The engine of model '{log.model}' runs on Modal, where any request keeps its replica up, so its "
                    "metrics are read only while it answers another request.",
                )
            if route.pool.endpoint() is None:  # the path reads what only a running engine has
                raise APIError(
                    404,
                    f"No engine of model '{log.model}' is running, and {path} reads what a running engine holds in "
                    f"memory. Send a request to '{log.model}' first; what an earlier engine held is lost.",
                )
            passed = {name: value for name, value in query.items() if name in _QUERY}
            request = UpstreamRequest(scope["method"], path, passed, scope["headers"], body, b"", streams=False)
            return Target(route.pool, request), []
        if not form:
            request_lists.check(path, body)
            media_urls.check(body, media_hosts(route.pool.spec.extra_args))
            constraints.check(fields)
        if path in _CALLS and fields.has_tools and not fields.declines_tools and route.pool.lacks_tool_parser:
            raise engine_errors.tools_not_supported()
        log.stream = bool(fields.stream) and api_route.streams
        if running.counts_tokens:
            answer = fields.max_tokens and fields.max_tokens * max(fields.n or 1, fields.best_of or 1)
            answers = not {"generate", "transcription"}.isdisjoint(api_route.tasks)
            size = form.text_bytes if form else len(body)
            running.reserve(size, answer if answers else 0, route.pool.max_model_len)

        def target(route: Route) -> Target:
            request = UpstreamRequest(scope["method"], path, {}, scope["headers"], body, b"", streams=log.stream)
            overrides = _overrides(fields, route)
            if overrides and form:
                request.body = form_data.with_model(body, form, route.name)
            elif overrides:
                request.body, request.suffix = with_overrides(body, overrides)
            return Target(route.pool, request)

        return target(route), [target(other) for other in self._fallbacks(api_route, route, scope, client)]

    def _check_task(self, api_route: ApiRoute, path: str, route: Route) -> None:
        """Refuse a route that the model's engine will not have, before anything wakes.

        Raises:
            APIError: 400.
        """
        if _may_have(route.pool.spec, api_route):
            return
        task, tasks = route.pool.spec.task, " or ".join(api_route.tasks)
        others = [spec.key for spec in self._router.registry.specs.values() if spec.task in api_route.tasks]
        advice = f"Choose one whose task is {tasks}: {', '.join(others) or 'no models file has one'}."
        raise engine_errors.unsupported_by_model(path, f"the task of model '{route.name}' is {task}", advice)

    def _fallbacks(self, api_route: ApiRoute, route: Route, scope: Message, client: ApiClient) -> list[Route]:
        """Return the routes of the models that may answer in place of the requested one, and that the client may use.

        Not where an answer is tied to its model: tokens and embeddings; nor of a form, of which each would have a copy.
        """
        spec = route.pool.spec
        if not (spec.fallback and api_route.streams and is_allowed(spec, scope["headers"])) or api_route.is_form:
            return []
        return [
            replace(other, is_exact_name=False, local_defaults=route.local_defaults)
            for other in map(self._router.find, spec.fallback)
            if client.may_use(other.pool.spec.key) and not other.pool.why_unfit(other.name)
        ]


def _may_have(spec: ModelSpec, api_route: ApiRoute) -> bool:
    """Tell whether an engine of this entry may have a route: what a chat model that hears has, only vLLM knows."""
    hears = "transcription" in api_route.tasks and spec.task == "generate" and "audio" in spec.modalities
    return hears or not api_route.tasks or spec.task is None or spec.task in api_route.tasks


def _overrides(fields: RequestFields, route: Route) -> dict[str, str | float]:
    overrides: dict[str, str | float] = {} if route.is_exact_name else {"model": route.name}
    if route.local_defaults and fields.has_tools:
        overrides |= {name: value for name, value in _LOCAL_DEFAULTS.items() if not fields.sets(name)}
    return overrides


class _WhileClientStays:
    """A context that cancels the work inside when the client leaves; the request then ends without an error.

    Args:
        scope: Of the request. The server of this machine tells at once when the client leaves, through an extension of
            ASGI; any other is asked by a task.
        receive: Receives from the client.
        log: Notes that it left.
    """

    def __init__(self, scope: Message, receive: Receive, log: RequestLog) -> None:
        self._extension = scope.get("extensions", {}).get(ON_LEAVE)
        self._receive, self._log = receive, log
        self._watching: asyncio.Future[None] | None = None

    async def __aenter__(self) -> None:
        """Begin to watch."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine of a server runs in one
        self._task = task
        if self._extension:
            self._extension(self._leave)
        else:
            self._watching = asyncio.ensure_future(_disconnected(self._receive))
            self._watching.add_done_callback(self._end_watch)

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        """End it; the end of the work is none of an error where the client has left."""
        if self._extension:
            self._extension(None)
        if self._watching:
            self._watching.remove_done_callback(self._end_watch)
            self._watching.cancel()
        if kind is None or not issubclass(kind, asyncio.CancelledError) or not self._log.client_left:
            return False
        self._task.uncancel()
        self._log.status = self._log.status or 499
        return True

    def _end_watch(self, watching: asyncio.Future[None]) -> None:
        if not watching.cancelled():
            self._leave()

    def _leave(self) -> None:
        self._log.client_left = True
        self._task.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
