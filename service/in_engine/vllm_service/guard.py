"""What stands in front of vLLM's routes: only those listed here exist, each with its key and its body limit.

vLLM's own `--api-key` covers a few prefixes and leaves full inference open on others, so the rule is turned round:
default deny. Pure ASGI, no imports of vLLM; `--middleware vllm_service.guard.Guard` makes it the outermost layer.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from vllm_service import drain, parent_pipe, request_lists

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MIB = 1024 * 1024
BODY_LIMIT = 32 * MIB  # a dozen photographs in base64
TEXT_BODY_LIMIT = 1 * MIB  # tokenizing 30 MB took the engine 40 s and 6 GB

# path -> methods; without a key, and with one
_OPEN = {"/health": {"GET"}, "/docs": {"GET"}, "/openapi.json": {"GET"}}
_KEYED = {
    "/v1/models": {"GET"},
    "/v1/chat/completions": {"POST"},
    "/v1/completions": {"POST"},
    "/v1/responses": {"POST"},
    "/v1/messages": {"POST"},
    "/v1/messages/count_tokens": {"POST"},
    "/v1/embeddings": {"POST"},
    "/tokenize": {"POST"},
    "/detokenize": {"POST"},
    "/metrics": {"GET"},
}
_KEYED_PATTERNS = (
    (re.compile(r"/v1/responses/[\w-]+"), {"GET"}),
    (re.compile(r"/v1/responses/[\w-]+/cancel"), {"POST"}),
)
_TEXT_ONLY = {"/tokenize", "/detokenize"}
_HEALTHY = b'{"status":"ok"}'


class Guard:
    """ASGI middleware.

    Args:
        app: vLLM's application.
        digests: SHA-256 of each key in hexadecimal; empty means that no key is asked for. Default: what the parent's
            release carried, which is refused to be absent.
        drain: Tells whether the end has begun. Default: this process's.
    """

    def __init__(self, app: App, digests: list[str] | None = None, drain_: drain.Drain | None = None) -> None:
        self.app = app
        self._given = digests
        self._drain = drain_ or drain.current()

    @property
    def _digests(self) -> list[str]:
        if self._given is None:
            link = parent_pipe.current()
            if link is None or "digests" not in link.release:
                raise RuntimeError("The guard got no word about keys; it serves nobody.")
            self._given = list(link.release["digests"])
        return self._given

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Let the request through, or answer it in OpenAI's error shape."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await receive()
            await send({"type": "websocket.close", "code": 4404})
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        allowed = _methods(path)
        if allowed is None:
            await refuse(
                send, 404, f"No route {path}. What this service has is listed at /docs.", kind="not_found_error"
            )
        elif method not in allowed | {"HEAD", "OPTIONS"} or (method == "HEAD" and "GET" not in allowed):
            await refuse(send, 405, f"{method} is not allowed on {path}; use {', '.join(sorted(allowed))}.")
        elif path not in _OPEN and method != "OPTIONS" and not self._admits(scope):
            await refuse(
                send,
                401,
                "A valid API key is needed: send 'Authorization: Bearer <key>'.",
                kind="authentication_error",
                code="invalid_api_key",
                headers=((b"www-authenticate", b"Bearer"),),
            )
        elif self._drain.begun:
            await drain.refuse(send)
        else:
            limit = TEXT_BODY_LIMIT if path in _TEXT_ONLY else BODY_LIMIT
            await self._drain.run(path, send, lambda send: self._pass_on(scope, receive, send, limit))

    def _admits(self, scope: Message) -> bool:
        if not self._digests:
            return True
        headers = dict(scope["headers"])
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        key = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        if not key:
            return False
        digest = hashlib.sha256(key).hexdigest()
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0  # compares with every one

    async def _pass_on(self, scope: Message, receive: Receive, send: Send, limit: int) -> None:
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        body = _LimitedBody(receive, send, limit)
        if not declared.isdigit() or int(declared) > limit:
            await body.refuse()
        elif scope["path"] == "/health":
            await self.app(scope, receive, _healthy(send))
        elif scope["method"] == "POST" and scope["path"] in request_lists.ROUTES:
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
            await refuse(body.send, 400, str(error), code="invalid_value", param=error.param, path=scope["path"])
            return
        waiting: list[Message] = [{"type": "http.request", "body": whole, "more_body": False}]
        del whole  # from here on only vLLM keeps it

        async def receive() -> Message:
            return waiting.pop() if waiting else await body.receive()

        await self.app(scope, receive, body.send)


class _LimitedBody:
    """Counts a body as it comes and ends the request with 413 once it is over the limit."""

    def __init__(self, receive: Receive, send: Send, limit: int) -> None:
        self._receive, self._send, self._limit = receive, send, limit
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
        await refuse(self._send, 413, f"The body is over the limit of {self._limit // MIB} MiB for this route.")


def _methods(path: str) -> set[str] | None:
    """Return the methods a path allows; None when there is no such path."""
    exact = _OPEN.get(path) or _KEYED.get(path)
    return exact or next((methods for pattern, methods in _KEYED_PATTERNS if pattern.fullmatch(path)), None)


def _healthy(send: Send) -> Send:
    """Give vLLM's empty 200 of /health a body, and say whose it is: the parent waits for its own engine's.

    Other answers pass as they are.
    """
    ok = answered = False

    async def wrapped(message: Message) -> None:
        nonlocal ok, answered
        if message["type"] == "http.response.start" and message["status"] == 200:
            ok = True
            message = {**message, "headers": [*_json_headers(_HEALTHY), (b"x-engine-pid", str(os.getpid()).encode())]}
        elif message["type"] == "http.response.body" and ok:
            if answered:  # an application may send an empty body in several messages
                return
            answered = True
            message = {"type": "http.response.body", "body": _HEALTHY}
        await send(message)

    return wrapped


async def refuse(
    send: Send,
    status: int,
    message: str,
    *,
    kind: str = "invalid_request_error",
    code: str | None = None,
    param: str | None = None,
    headers: tuple[tuple[bytes, bytes], ...] = (),
    path: str = "",
) -> None:
    """Answer with an error in OpenAI's shape; Anthropic's, for a path of theirs, has one field more."""
    error = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    anthropic = {"type": "error"} if path.startswith("/v1/messages") else {}
    body = json.dumps({**anthropic, **error}).encode()
    await send({"type": "http.response.start", "status": status, "headers": [*_json_headers(body), *headers]})
    await send({"type": "http.response.body", "body": body})


def _json_headers(body: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
