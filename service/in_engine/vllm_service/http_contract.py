"""The HTTP API: every route with its method, key, body limit and stream, and the errors of each protocol.

Gateway, guard and tests read it. A route that is not in `ROUTES` does not exist: neither gateway nor guard serves it.
It imports only the standard library, since the gateway's process and the engine's both import it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal

MIB = 1024 * 1024
BODY_LIMIT = 32 * MIB  # a dozen photographs in base64
TEXT_BODY_LIMIT = 1 * MIB  # tokenizing 30 MB took the engine 40 s and 6 GB
JSON = "application/json"
EVENT_STREAM = "text/event-stream"
HEALTHY = b'{"status":"ok"}'


@dataclass(frozen=True)
class ApiRoute:
    """One method of one path.

    Attributes:
        method: HTTP method; GET includes HEAD.
        path: `{name}` stands for one segment of letters, digits, `_` and `-`.
        summary: What it does, for `/docs`.
        needs_key: Whether a request must carry an API key.
        model_from: Where the gateway reads which model's engine answers; None: the gateway answers itself.
        is_own_without_model: The gateway answers itself when the query names no model.
        streams: Whether the answer is a stream of events when the body's `stream` is true.
        body_limit: Bytes that a body may have.
        task: vLLM's name of the task for which an engine registers the route; None: every engine does. Tests compare
            it with engines.
    """

    method: str
    path: str
    summary: str
    needs_key: bool = True
    model_from: Literal["body", "query"] | None = None
    is_own_without_model: bool = False
    streams: bool = False
    body_limit: int = BODY_LIMIT
    task: Literal["generate", "embed"] | None = None


def _by_path(routes: Iterable[ApiRoute]) -> dict[str, dict[str, ApiRoute]]:
    table: dict[str, dict[str, ApiRoute]] = {}
    for route in routes:
        table.setdefault(route.path, {})[route.method] = route
    return table


def _generates(path: str, summary: str, *, streams: bool = True) -> ApiRoute:
    return ApiRoute("POST", path, summary, model_from="body", streams=streams, task="generate")


# path -> method -> route
ROUTES = _by_path(
    [
        _generates("/v1/chat/completions", "Chat; `stream`, tools, images, structured outputs"),
        _generates("/v1/completions", "Completion of a prompt"),
        _generates("/v1/responses", "OpenAI's Responses"),
        ApiRoute(
            "GET",
            "/v1/responses/{response_id}",
            "A stored response; the query's `model` names its model",
            model_from="query",
            task="generate",
        ),
        ApiRoute(
            "POST",
            "/v1/responses/{response_id}/cancel",
            "Cancels a response in the background; the query's `model` names its model",
            model_from="query",
            task="generate",
        ),
        _generates("/v1/messages", "Anthropic's Messages"),
        _generates("/v1/messages/count_tokens", "Tokens of an Anthropic message", streams=False),
        ApiRoute("POST", "/v1/embeddings", "Embeddings, from models that make them", model_from="body", task="embed"),
        ApiRoute("POST", "/tokenize", "Tokens of a text or of messages", model_from="body", body_limit=TEXT_BODY_LIMIT),
        ApiRoute("POST", "/detokenize", "Text of tokens", model_from="body", body_limit=TEXT_BODY_LIMIT),
        ApiRoute("GET", "/v1/models", "The models, with GPU, context, price and state; wakes nothing"),
        ApiRoute(
            "GET",
            "/metrics",
            "Counters for Prometheus; with ?model=<name> those of its engine; wakes nothing",
            model_from="query",
            is_own_without_model=True,
        ),
        ApiRoute("GET", "/health", "Whether the service answers; needs no key, wakes nothing", needs_key=False),
        ApiRoute("GET", "/docs", "This page; needs no key", needs_key=False),
        ApiRoute("GET", "/openapi.json", "The routes, for programs; needs no key", needs_key=False),
    ]
)


def routes_at(path: str) -> Mapping[str, ApiRoute]:
    """Return the routes of a path by method; none when there is no such path."""
    if found := ROUTES.get(path):
        return found if "{" not in path else {}
    return next((found for known, found in ROUTES.items() if "{" in known and _pattern(known).fullmatch(path)), {})


@functools.lru_cache
def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"{\w+}", "[A-Za-z0-9_-]+", path))


def is_open(routes: Mapping[str, ApiRoute]) -> bool:
    """Tell whether a path is there for requests without a key."""
    return any(not route.needs_key for route in routes.values())


def key_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the API key that a request's headers carry: OpenAI's header, or Anthropic's; empty when there is none."""
    found = dict(headers)
    scheme, _, token = found.get(b"authorization", b"").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else found.get(b"x-api-key", b"")


class Protocol(Enum):
    """Whose API a path belongs to, which decides the shape of its errors."""

    OPENAI = "openai"
    RESPONSES = "responses"  # OpenAI's too; its streams consist of named events
    ANTHROPIC = "anthropic"


def protocol_of(path: str) -> Protocol:
    """Return the protocol of a path, of one that does not exist too."""
    if path.startswith("/v1/messages"):
        return Protocol.ANTHROPIC
    return Protocol.RESPONSES if path.startswith("/v1/responses") else Protocol.OPENAI


def error_fields(
    message: str, kind: str = "invalid_request_error", code: str | int | None = None, param: str | None = None
) -> dict[str, object]:
    """Return the fields that OpenAI's errors have."""
    return {"message": message, "type": kind, "param": param, "code": code}


def error_body(path: str, error: Mapping[str, object]) -> bytes:
    """Return the body of an error answer; Anthropic's has a `type` beside OpenAI's fields."""
    anthropic = {"type": "error"} if protocol_of(path) is Protocol.ANTHROPIC else {}
    return json.dumps({**anthropic, "error": error}).encode()


def error_event(path: str, error: Mapping[str, object]) -> bytes:
    """Return the end of a stream that fails after its headers were sent: an error event, and `[DONE]` where due.

    On the Responses API an error with an HTTP `status` is nested too: OpenAI's client raises it then, as it would have
    raised the status.
    """
    match protocol_of(path):
        case Protocol.ANTHROPIC:
            return _named_event({"type": "error", "error": error})
        case Protocol.RESPONSES:
            return _named_event({**error, "type": "error"} | ({"error": error} if "status" in error else {}))
        case Protocol.OPENAI:
            return b"data: " + json.dumps({"error": error}).encode() + b"\n\ndata: [DONE]\n\n"


def _named_event(data: Mapping[str, object]) -> bytes:
    return b"event: error\ndata: " + json.dumps(data).encode() + b"\n\n"


def no_route(path: str) -> str:
    """Return the sentence of a 404."""
    return f"No route {path}. What this service has is listed at /docs."


def not_allowed(method: str, path: str, routes: Mapping[str, ApiRoute]) -> str:
    """Return the sentence of a 405."""
    return f"{method} is not allowed on {path}; use {', '.join(sorted(routes))}."


def too_large(limit: int) -> str:
    """Return the sentence of a 413."""
    return f"The body is over the limit of {limit // MIB} MiB for this route."
