"""The errors of the API: their names by status, and their shape in the protocol of each route.

Gateway and guard both answer with them. It imports only the standard library and `http_contract`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from .http_contract import JSON, MIB, ROUTES, ApiRoute, Protocol, protocol_of, request_id_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class ErrorNames:
    """What the errors of one status are called.

    Attributes:
        openai: OpenAI's `type`.
        anthropic: Anthropic's `type`.
        code: OpenAI's `code` of an error that has no code of its own.
    """

    openai: str
    anthropic: str
    code: str


_INVALID = "invalid_request_error"
_LENGTH_DIGITS = 20
# Source of the types: OpenAI's and Anthropic's references, and the error classes of their clients.
ERROR_NAMES: Mapping[int, ErrorNames] = {
    400: ErrorNames(_INVALID, _INVALID, "invalid_request"),
    401: ErrorNames("authentication_error", "authentication_error", "invalid_api_key"),
    403: ErrorNames("permission_error", "permission_error", "permission_denied"),
    404: ErrorNames("not_found_error", "not_found_error", "not_found"),
    405: ErrorNames(_INVALID, _INVALID, "method_not_allowed"),
    408: ErrorNames(_INVALID, _INVALID, "request_timeout"),
    413: ErrorNames(_INVALID, "request_too_large", "body_too_large"),
    415: ErrorNames(_INVALID, _INVALID, "unsupported_media_type"),
    426: ErrorNames(_INVALID, _INVALID, "upgrade_required"),
    429: ErrorNames("rate_limit_error", "rate_limit_error", "rate_limit_exceeded"),
    500: ErrorNames("server_error", "api_error", "internal_error"),
    502: ErrorNames("server_error", "api_error", "engine_error"),
    503: ErrorNames("server_error", "overloaded_error", "unavailable"),
    504: ErrorNames("server_error", "timeout_error", "timeout"),
}


def error_names(status: int) -> ErrorNames:
    """Return the names of a status; one that is not in the table has those of 400 or 500."""
    return ERROR_NAMES.get(status) or ERROR_NAMES[400 if status < 500 else 500]


class APIError(Exception):
    """Ends a request with a status and a message for its client; the message holds no secret and no content.

    Args:
        status: HTTP status.
        message: What happened, the actual value, what was expected, the next step.
        code: OpenAI's `code`, a word that programs can test. Default: that of the status.
        param: The field of the body that is at fault.
        retry_after_s: The time after which to retry. OpenAI's and Anthropic's clients repeat a request after 409, 429
            and every 5xx, Claude Code after 401, ten times in minutes; without this time the answer tells them not to.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.names = error_names(status)
        self.status, self.message, self.code, self.param = status, message, code or self.names.code, param
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(max(1, round(retry_after_s)))
        elif status in {401, 409, 429} or status >= 500:
            self.headers["x-should-retry"] = "false"

    def body(self, path: str, request_id: str) -> bytes:
        """Return the body of the answer to a request for `path`."""
        if protocol_of(path) is Protocol.ANTHROPIC:
            return json.dumps(self._anthropic(request_id)).encode()
        return json.dumps({"error": self._openai()}).encode()

    def event(self, path: str, request_id: str) -> bytes:
        """Return the end of a stream that fails after its headers were sent: error events, and `[DONE]` where due.

        OpenAI's have the status too. On the Responses API their clients raise what is nested in `error`, and Codex
        reads `response.failed` alone.
        """
        match protocol_of(path):
            case Protocol.ANTHROPIC:
                return _event("error", self._anthropic(request_id))
            case Protocol.RESPONSES:
                error = {**self._openai(), "status": self.status}
                failed = {
                    "id": f"resp_{request_id}",
                    "object": "response",
                    "created_at": int(time.time()),
                    "status": "failed",
                    "error": {"code": self.code, "message": self.message},
                    "output": [],
                }
                return _event("error", {**error, "sequence_number": 0, "error": error, "type": "error"}) + _event(
                    "response.failed", {"type": "response.failed", "sequence_number": 1, "response": failed}
                )
            case Protocol.OPENAI:
                error = {**self._openai(), "status": self.status}
                return b"data: " + json.dumps({"error": error}).encode() + b"\n\ndata: [DONE]\n\n"

    async def send(self, path: str, request_id: str, send: Send) -> None:
        """Send the whole answer to a request for `path` over ASGI."""
        body = self.body(path, request_id)
        headers = {"content-type": JSON, "content-length": str(len(body)), **self.headers}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        raw += request_id_headers(path, request_id)
        await send({"type": "http.response.start", "status": self.status, "headers": raw})
        await send({"type": "http.response.body", "body": body})

    def _openai(self) -> dict[str, object]:
        return {"message": self.message, "type": self.names.openai, "param": self.param, "code": self.code}

    def _anthropic(self, request_id: str) -> dict[str, object]:
        error = {"type": self.names.anthropic, "message": self.message}
        return {"type": "error", "error": error, "request_id": request_id}


def request_id_headers(path: str, request_id: str) -> list[tuple[bytes, bytes]]:
    """Return the headers that tell a request's id; Anthropic's clients read theirs."""
    headers = [(b"x-request-id", request_id.encode())]
    return [*headers, (b"request-id", request_id.encode())] if protocol_of(path) is Protocol.ANTHROPIC else headers


def _event(name: str, data: Mapping[str, object]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def no_route(path: str, base_url: str) -> APIError:
    """Return the error of a path that the API does not have; it names the one that was probably meant."""
    near = next((known for known in _BY_LENGTH if path.endswith((known, known.removeprefix("/v1")))), None)
    meant = f" Did you mean {near}?" if near else ""
    return APIError(
        404,
        f"No route {path[:200]}. What this service has is listed at /docs.{meant} The base URL is {base_url}/v1 for "
        f"OpenAI's clients and {base_url or '/'} for Anthropic's.",
        code="route_not_found",
    )


_BY_LENGTH = sorted((path for path in ROUTES if path.startswith("/v1/") and "{" not in path), key=len, reverse=True)


def not_allowed(method: str, path: str, routes: Mapping[str, ApiRoute]) -> APIError:
    """Return the error of a method that a path does not have."""
    allowed = ", ".join(sorted(routes))
    return APIError(405, f"{method} is not allowed on {path}; use {allowed}.", headers={"Allow": allowed})


def no_websocket(path: str) -> APIError:
    """Return the error of a websocket's handshake, with the status that makes Codex fall back to HTTP at once."""
    message = f"This service has no websockets; send requests for {path} as plain HTTP."
    return APIError(426, message, headers={"Upgrade": "HTTP/1.1", "Connection": "Upgrade"})


async def refuse_websocket(scope: Message, receive: Receive, send: Send) -> None:
    """Answer an ASGI server's websocket handshake; one without an extension for other answers makes it 403."""
    await receive()
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 4404})
        return

    async def send_denial(message: Message) -> None:
        await send({**message, "type": f"websocket.{message['type']}"})

    path, request_id = scope["path"], request_id_of(scope["headers"])
    await no_websocket(path).send(path, request_id, send_denial)


def unauthorized() -> APIError:
    """Return the error of a request without a valid key.

    Claude Code says "Not logged in. Please run /login" in place of a sentence that has the word x-api-key.
    """
    return APIError(
        401,
        "A valid API key is needed: send 'Authorization: Bearer <key>'.",
        headers={"WWW-Authenticate": "Bearer"},
    )


def too_large(limit: int) -> APIError:
    """Return the error of a body over its route's limit."""
    size = f"{limit // MIB} MiB" if limit >= MIB else f"{limit // 1024} KiB"
    return APIError(413, f"The body is over the limit of {size} for this route.")


def head_too_large(limit: int) -> APIError:
    """Return the error of a request line and headers over their limit, or of trailers."""
    message = f"The request line and headers, or the trailers, are over the limit of {limit} bytes."
    return APIError(431, message, code="headers_too_large")


def too_many_heads() -> APIError:
    """Return the error of a head, or of trailers, that has been incomplete longest where all take too much memory."""
    message = "This service holds too many incomplete requests. Send the whole request again in 1 s."
    return APIError(503, message, code="too_many_bytes", retry_after_s=1)


def check_length(declared: bytes, limit: int) -> None:
    """Refuse a body by its `Content-Length`.

    Raises:
        APIError: 400 or 413.
    """
    if parse_length(declared) > limit:
        raise too_large(limit)


def parse_length(declared: bytes) -> int:
    """Return the number of a `Content-Length`; Python does not read one of more than 4,300 digits.

    Raises:
        APIError: 400.
    """
    if not declared.isdigit() or len(declared) > _LENGTH_DIGITS:
        raise APIError(
            400, f"The Content-Length must be a number of at most {_LENGTH_DIGITS} digits.", code="invalid_http"
        )
    return int(declared)
