"""ASGI middleware in front of vLLM's routes: it serves those of `http_contract` only, with their keys and body limits.

vLLM's own `--api-key` covers a few prefixes and leaves full inference open on others, so the guard denies by default.
It imports nothing of vLLM; `--middleware vllm_service.guard.Guard` makes it the outermost layer.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from vllm_service import drain, http_contract, parent_pipe, request_lists

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


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

    @property
    def _digests(self) -> list[str]:
        if self._given is None:
            pipe = parent_pipe.current()
            if pipe is None or "digests" not in pipe.release:
                raise RuntimeError("The release command carried no key digests, so the guard serves no request.")
            self._given = list(pipe.release["digests"])
        return self._given

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with an API error."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await receive()
            await send({"type": "websocket.close", "code": 4404})
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        routes = http_contract.routes_at(path)
        route = routes.get("GET" if method == "HEAD" else method)
        if not routes:
            await send_error(send, path, 404, http_contract.no_route(path), kind="not_found_error")
        elif route is None and method != "OPTIONS":
            await send_error(send, path, 405, http_contract.not_allowed(method, path, routes))
        elif route and route.needs_key and not self._admits(scope):
            await send_error(
                send,
                path,
                401,
                "A valid API key is needed: send 'Authorization: Bearer <key>'.",
                kind="authentication_error",
                code="invalid_api_key",
                headers=((b"www-authenticate", b"Bearer"),),
            )
        elif self._drain.begun:
            await drain.send_shutdown_error(path, send)
        else:
            limit = route.body_limit if route else http_contract.TEXT_BODY_LIMIT  # of OPTIONS
            await self._drain.run(path, send, lambda send: self._pass_on(scope, receive, send, limit))

    def _admits(self, scope: Message) -> bool:
        if not self._digests:
            return True
        key = http_contract.key_of(scope["headers"])
        if not key:
            return False
        digest = hashlib.sha256(key).hexdigest()
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0  # compares with every one

    async def _pass_on(self, scope: Message, receive: Receive, send: Send, limit: int) -> None:
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        body = _LimitedBody(scope["path"], receive, send, limit)
        if not declared.isdigit() or int(declared) > limit:
            await body.refuse()
        elif scope["path"] == "/health":
            await self.app(scope, receive, _healthy(send))
        elif scope["method"] == "POST" and scope["path"] in request_lists.LISTS:
            await self._check_lists(scope, body)
        else:
            await self.app(scope, body.receive, body.send)

    async def _check_lists(self, scope: Message, body: _LimitedBody) -> None:
        """Pass the request on once its body is here and its lists are such that vLLM can parse them."""
        whole = await body.read()
        if whole is None:
            return
        try:
            request_lists.check(scope["path"], whole)
        except request_lists.InvalidListError as error:
            await send_error(body.send, scope["path"], 400, str(error), code="invalid_value", param=error.param)
            return
        waiting: list[Message] = [{"type": "http.request", "body": whole, "more_body": False}]
        del whole  # from here on only vLLM keeps it

        async def receive() -> Message:
            return waiting.pop() if waiting else await body.receive()

        await self.app(scope, receive, body.send)


class _LimitedBody:
    """Counts the bytes of a body as they arrive, and ends the request with 413 once they exceed the limit."""

    def __init__(self, path: str, receive: Receive, send: Send, limit: int) -> None:
        self._path, self._receive, self._send, self._limit = path, receive, send, limit
        self._seen, self._started, self._refused = 0, False, False

    async def receive(self) -> Message:
        message = await self._receive()
        self._seen += len(message.get("body", b""))
        if self._seen > self._limit and not self._refused:
            if not self._started:
                await self.refuse()
            self._refused = True
        return {"type": "http.disconnect"} if self._refused else message

    async def read(self) -> bytes | None:
        """Return the whole body; None when it was refused or the client left."""
        pieces, more = [], True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message.get("body", b""))
            more = message.get("more_body", False)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def send(self, message: Message) -> None:
        self._started = True
        if not self._refused:
            await self._send(message)

    async def refuse(self) -> None:
        self._refused = True
        await send_error(self._send, self._path, 413, http_contract.too_large(self._limit))


def _healthy(send: Send) -> Send:
    """Give vLLM's empty 200 of /health a body and the engine's process id, by which the parent knows its own engine.

    Other answers pass unchanged.
    """
    ok = answered = False

    async def wrapped(message: Message) -> None:
        nonlocal ok, answered
        if message["type"] == "http.response.start" and message["status"] == 200:
            ok = True
            pid = (b"x-engine-pid", str(os.getpid()).encode())
            message = {**message, "headers": [*_json_headers(http_contract.HEALTHY), pid]}
        elif message["type"] == "http.response.body" and ok:
            if answered:  # an application may send an empty body in several messages
                return
            answered = True
            message = {"type": "http.response.body", "body": http_contract.HEALTHY}
        await send(message)

    return wrapped


async def send_error(
    send: Send,
    path: str,
    status: int,
    message: str,
    *,
    kind: str = "invalid_request_error",
    code: str | None = None,
    param: str | None = None,
    headers: tuple[tuple[bytes, bytes], ...] = (),
) -> None:
    """Answer with an error in the shape of the path's protocol."""
    body = http_contract.error_body(path, http_contract.error_fields(message, kind, code, param))
    await send({"type": "http.response.start", "status": status, "headers": [*_json_headers(body), *headers]})
    await send({"type": "http.response.body", "body": body})


def _json_headers(body: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"content-type", http_contract.JSON.encode()), (b"content-length", str(len(body)).encode())]
