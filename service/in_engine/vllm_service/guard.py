"""ASGI middleware in front of vLLM's routes: it serves those of `http_contract` only, with their keys and body limits.

vLLM's own `--api-key` covers a few prefixes and leaves full inference open on others, so the guard denies by default.
It imports nothing of vLLM; `--middleware vllm_service.guard.Guard` makes it the outermost layer.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import hmac
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

from vllm_service import (
    api_error,
    client_turns,
    drain,
    engine_errors,
    form_data,
    http_contract,
    image_pixels,
    media_urls,
    parent_pipe,
    parse_turns,
    request_lists,
    request_usage,
    trace_context,
    traces,
)
from vllm_service.answer import Answer
from vllm_service.api_error import APIError, Message, Receive, Send
from vllm_service.events import Event
from vllm_service.http_contract import CLIENT_HEADER, ApiRoute
from vllm_service.limited_body import LimitedBody
from vllm_service.overrides import with_overrides
from vllm_service.request_usage import RequestUsage, RunningTime

App = Callable[[Message, Receive, Send], Awaitable[None]]
_PIECE = 256 * 1024  # bytes
_LOGGER = logging.getLogger("vllm.vllm_service.guard")  # below vLLM's logger, the only one that has a handler


class Guard:
    """ASGI middleware.

    Args:
        app: vLLM's application.
        digests: SHA-256 of each key in hexadecimal; empty: requests need no key. Default: the digests of the parent's
            release command.
        drain_: Tells whether the drain has begun. Default: this process's.

    Raises:
        RuntimeError: At the first request, when neither an argument nor the release command gave digests.
    """

    def __init__(self, app: App, digests: list[str] | None = None, drain_: drain.Drain | None = None) -> None:
        self.app = app
        self._given = digests
        self._drain = drain_ or drain.current()
        self._parsing = parse_turns.ParseTurns()
        self._running = RunningTime()

    @property
    def _digests(self) -> list[str]:
        if self._given is None:
            pipe = parent_pipe.current()
            if pipe is None or "digests" not in pipe.release:
                raise RuntimeError("The release command carried no key digests, so the guard serves no request.")
            self._given = list(pipe.release["digests"])
        return self._given

    @functools.cached_property
    def _replica(self) -> bytes | None:
        """The id that the release command gave this replica."""
        pipe = parent_pipe.current()
        name = pipe.release.get("replica") if pipe else None
        return name.encode() if name else None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with an API error."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await api_error.refuse_websocket(scope, receive, send)
        else:
            scope["path"] = http_contract.canonical_path(scope["path"])
            await self._http(scope, receive, send)

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        client = headers.get(CLIENT_HEADER)
        usage = RequestUsage(self._running) if scope["method"] == "POST" else None
        answer = Answer(scope, send, usage if client else None, self._replica if client else None)
        try:
            if route := self._route(scope):
                if traces.enabled:
                    scope["headers"] = trace_context.bounded(scope["headers"])
                # The parent's own key and the gateway's; none where Modal's proxy asks for its token.
                is_named = len(self._digests) <= 2
                client_turns.client.set(http_contract.client_of(headers, is_named=is_named))
                request_usage.current.set(usage)
                await self._drain.run(answer, lambda: self._pass_on(scope, headers, receive, answer, route))
            else:
                await _send_methods(_routes_at(scope["path"]), send)
        except APIError as error:
            await answer.fail(error)
        except MemoryError:  # of the body itself; vLLM's own are answered likewise
            await answer.fail(engine_errors.engine_error())
        finally:
            answer.close()
            if usage:
                self._end(usage, client)

    def _end(self, usage: RequestUsage, client: bytes | None) -> None:
        """Count a request that has ended; what no answer could tell the gateway, the parent is told."""
        if client and usage.has_run and not usage.is_reported and len(self._digests) <= 2:
            used = usage.report()
            counts = {"tokens_in": used.tokens_in, "tokens_cached": used.tokens_cached, "tokens_out": used.tokens_out}
            if pipe := parent_pipe.current():
                pipe.emit(Event.USAGE, client=client.decode("latin-1"), share_s=used.share_s, **counts)
        usage.close()

    def _route(self, scope: Message) -> ApiRoute | None:
        """Return the route of a request with a valid key; None: it is OPTIONS, which needs no key.

        Raises:
            APIError: 401, 404 or 405.
        """
        path, method = scope["path"], scope["method"]
        route = http_contract.routes_at(path).get("GET" if method == "HEAD" else method)
        if route is None or route.gateway_only:
            route, routes = None, _routes_at(path)
            if not routes:
                raise api_error.no_route(path, http_contract.base_url(scope))
            if method != "OPTIONS":
                raise api_error.not_allowed(method, path, routes)
        if route and path != "/health" and not self._admits(scope):  # vLLM's /docs lists routes that are closed
            raise api_error.unauthorized()
        return route

    def _admits(self, scope: Message) -> bool:
        if not self._digests:
            return True
        keys = http_contract.keys_of(dict(scope["headers"]))
        digests = [hashlib.sha256(key).hexdigest() for key in keys]
        # compares each with every one
        return sum(hmac.compare_digest(digest, known) for digest in digests for known in self._digests) > 0

    async def _pass_on(
        self, scope: Message, headers: dict[bytes, bytes], receive: Receive, answer: Answer, route: ApiRoute
    ) -> None:
        limit, declared = route.body_limit, headers.get(b"content-length", b"0")
        body = LimitedBody(receive, answer, limit)
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise APIError(
                415,
                "The engine takes no compressed bodies; send it without a Content-Encoding, or through the gateway.",
                code="unsupported_content_encoding",
                headers={"Accept-Encoding": "identity"},
            )
        api_error.check_length(declared, limit)
        if scope["path"] == "/health":
            await self.app(scope, receive, _healthy(answer.pass_on, getattr(scope.get("app"), "state", None)))
        elif scope["method"] == "POST" and scope["path"] in request_lists.PATHS:
            await self._check_lists(scope, body, answer)
        elif route.is_form:
            await self._check_form(scope, body, answer)
        else:
            await self._ask_vllm(scope, body.receive, answer)

    async def _ask_vllm(self, scope: Message, receive: Receive, answer: Answer) -> None:
        try:
            await self.app(scope, receive, answer.send)
        except Exception as failure:
            error = engine_errors.from_exception(answer.path, failure)
            if error.status >= 500:
                _LOGGER.exception("request %s failed in vLLM", answer.request_id)
            if not await answer.fail(error):
                raise  # the server breaks the connection off: half an answer must not look like a whole one

    async def _check_lists(self, scope: Message, body: LimitedBody, answer: Answer) -> None:
        """Pass the request on once its body is here and its lists are such that vLLM can parse them."""
        whole = await body.read()
        if whole is None:
            return
        changes = request_lists.check(scope["path"], whole)
        media = media_urls.check(whole, _media_hosts(scope))
        pixels = await asyncio.to_thread(image_pixels.check, media) if media else 0
        media.clear()  # they are views into the body
        if changes:
            whole = b"".join(with_overrides(whole, changes))
        waiting: list[Message] = [{"type": "http.request", "body": whole, "more_body": False}]
        is_long = pixels > image_pixels.LARGE_PIXELS or parse_turns.is_long(scope["path"], whole)
        del whole  # from here on only vLLM keeps it
        if is_long:
            await self._ask_in_turn(scope, body, waiting, answer)
            return

        async def receive() -> Message:
            return waiting.pop() if waiting else await body.receive()

        await self._ask_vllm(scope, receive, answer)

    async def _check_form(self, scope: Message, body: LimitedBody, answer: Answer) -> None:
        """Pass the request on once its form is here and vLLM reads it as the gateway did."""
        whole = await body.read()
        if whole is None:
            return
        form_data.read(http_contract.header_of(scope["headers"], b"content-type"), whole, _max_n())
        waiting = _pieces(whole)
        del whole

        async def receive() -> Message:
            return next(waiting, None) or await body.receive()

        await self._ask_vllm(scope, receive, answer)

    async def _ask_in_turn(self, scope: Message, body: LimitedBody, waiting: list[Message], answer: Answer) -> None:
        """Pass a request on whose body takes vLLM long, when it is its client's turn and the client is still there."""
        left = asyncio.ensure_future(body.receive())

        async def receive() -> Message:
            return waiting.pop() if waiting else await asyncio.shield(left)

        try:
            async with self._parsing.take():
                if not left.done():
                    await self._ask_vllm(scope, receive, answer)
        finally:
            left.cancel()


def _healthy(send: Send, state: Any) -> Send:
    """Give vLLM's empty 200 of /health a body, and headers that say which engine this is.

    By the process id the parent knows its own engine; by the context, which the startup plugin put into the
    application's `state`, the gateway knows what it lists. Other answers pass unchanged.
    """
    ok = answered = False
    facts = {"x-engine-pid": os.getpid(), "x-max-model-len": getattr(state, "max_model_len", None)}

    async def wrapped(message: Message) -> None:
        nonlocal ok, answered
        if message["type"] == "http.response.start" and message["status"] == 200:
            ok = True
            own = [(name.encode(), str(value).encode()) for name, value in facts.items() if value is not None]
            message = {**message, "headers": [*_json_headers(http_contract.HEALTHY), *own]}
        elif message["type"] == "http.response.body" and ok:
            if answered:  # an application may send an empty body in several messages
                return
            answered = True
            message = {"type": "http.response.body", "body": http_contract.HEALTHY}
        await send(message)

    return wrapped


def _pieces(body: bytes) -> Iterator[Message]:
    """Yield the messages of a body, each of which vLLM parses in one go."""
    for begin in range(0, len(body), _PIECE):
        piece = body[begin : begin + _PIECE]
        yield {"type": "http.request", "body": piece, "more_body": begin + _PIECE < len(body)}


def _max_n() -> int:
    """Return the most answers to one request, as vLLM bounds them too; the parent sets it."""
    return int(os.environ.get("VLLM_MAX_N_SEQUENCES", "1"))


def _media_hosts(scope: Message) -> tuple[str, ...]:
    """Return the hosts that the engine's command line lists; vLLM keeps it in its application's state."""
    args = getattr(getattr(scope.get("app"), "state", None), "args", None)
    return tuple(getattr(args, "allowed_media_domains", None) or ())


def _routes_at(path: str) -> dict[str, ApiRoute]:
    return {method: route for method, route in http_contract.routes_at(path).items() if not route.gateway_only}


async def _send_methods(routes: Iterable[str], send: Send) -> None:
    allow = ", ".join(sorted(routes)).encode()
    await send({"type": "http.response.start", "status": 204, "headers": [(b"allow", allow)]})
    await send({"type": "http.response.body"})


def _json_headers(body: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"content-type", http_contract.JSON.encode()), (b"content-length", str(len(body)).encode())]
