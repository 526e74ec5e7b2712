"""The HTTP API: every route with its method, key, body limit and stream, and the protocol it belongs to.

Gateway, guard and tests read it. A route that is not in `ROUTES` does not exist: neither gateway nor guard serves it.
It imports only the standard library, since the gateway's process and the engine's both import it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

MIB = 1024 * 1024
BODY_LIMIT = 32 * MIB  # a dozen photographs in base64
TEXT_BODY_LIMIT = MIB // 2  # tokenizing it takes the engine 0.5 s; 30 MB took 40 s and 6 GB
ADMIN_BODY_LIMIT = 64 * 1024
FILE_LIMIT = 2048 * MIB  # a file of `/v1/files`, which goes to the disk as it arrives
IMAGE_PIXELS = 1 << 26  # 8,192 x 8,192: 0.2 GB in RGB; a camera's 50 million
HEAD_LIMIT = 128 * 1024  # a request line and its headers
ALL_HEADS_LIMIT = 64 * MIB  # of memory that the incomplete heads of all connections take
JSON = "application/json"
FORM = "multipart/form-data"
EVENT_STREAM = "text/event-stream"
STREAM_HEADERS = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]  # proxies pass each event at once
HEALTHY = b'{"status":"ok"}'
KEY_HEADERS = (b"authorization", b"x-api-key", b"api-key")  # OpenAI's with `Bearer`, Anthropic's, Azure's

Task = Literal["generate", "embed", "classify", "transcription"]

CLIENT_HEADER = b"x-api-client"  # the name of a client's key, from the gateway to the engine
BATCH_HEADER = b"x-batch"  # likewise: the request is a line of a batch
BATCHES = "\0batches"  # whose requests those are at the engine: all batches have the share of one client


@dataclass(frozen=True)
class ApiRoute:
    """One method of one path.

    Attributes:
        method: HTTP method; GET includes HEAD.
        path: `{model}` stands for a name of one to three segments, such as a hub id; `{file}` for a file's name with
            its ending; every other `{name}` for one segment of letters, digits, `_` and `-`.
        summary: What it does, for `/docs`.
        needs_key: Whether a request to the gateway must carry an API key; the guard serves only /health without one.
        model_from: Where the gateway reads which model's engine answers; None: the gateway answers itself.
        is_own_without_model: The gateway answers itself when the query names no model.
        streams: Whether the answer is a stream of events when the body's `stream` is true.
        body_limit: Bytes that a body may have.
        tasks: vLLM's names of the tasks for which an engine registers the route; none: every engine does. Tests compare
            them with engines.
        is_form: The body is a form with a file in place of JSON.
        gateway_only: No engine has it.
        admin: The gateway answers to keys of operators only.
    """

    method: str
    path: str
    summary: str
    needs_key: bool = True
    model_from: Literal["body", "query"] | None = None
    is_own_without_model: bool = False
    streams: bool = False
    body_limit: int = BODY_LIMIT
    tasks: tuple[Task, ...] = ()
    is_form: bool = False
    gateway_only: bool = False
    admin: bool = False


def _by_path(routes: Iterable[ApiRoute]) -> dict[str, dict[str, ApiRoute]]:
    table: dict[str, dict[str, ApiRoute]] = {}
    for route in routes:
        table.setdefault(route.path, {})[route.method] = route
    return table


def _admin(method: str, path: str, summary: str) -> ApiRoute:
    return ApiRoute(method, path, summary, body_limit=ADMIN_BODY_LIMIT, gateway_only=True, admin=True)


def _batch(method: str, path: str, summary: str) -> ApiRoute:
    limits = {"/v1/files": FILE_LIMIT + MIB, "/v1/batches": ADMIN_BODY_LIMIT}
    return ApiRoute(method, path, summary, body_limit=limits.get(path, 0) if method == "POST" else 0, gateway_only=True)


def _generates(path: str, summary: str, *, streams: bool = True) -> ApiRoute:
    return ApiRoute("POST", path, summary, model_from="body", streams=streams, tasks=("generate",))


def _pools(path: str, summary: str, *tasks: Task) -> ApiRoute:
    return ApiRoute("POST", path, summary, model_from="body", tasks=tasks)


def _transcribes(path: str, summary: str) -> ApiRoute:
    return ApiRoute("POST", path, summary, model_from="body", streams=True, tasks=("transcription",), is_form=True)


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
            tasks=("generate",),
        ),
        ApiRoute(
            "POST",
            "/v1/responses/{response_id}/cancel",
            "Cancels a response in the background; the query's `model` names its model",
            model_from="query",
            tasks=("generate",),
        ),
        _generates("/v1/messages", "Anthropic's Messages"),
        _generates("/v1/messages/count_tokens", "Tokens of an Anthropic message", streams=False),
        _pools("/v1/embeddings", "Embeddings, from models that make them", "embed"),
        _pools("/v1/rerank", "Documents by their relevance to a query", "classify", "embed"),
        _pools("/v1/score", "How well texts fit each other, pair by pair", "classify", "embed"),
        _pools("/classify", "Probabilities of a text's classes", "classify"),
        _transcribes("/v1/audio/transcriptions", "What is said in a recording; `stream`"),
        _transcribes("/v1/audio/translations", "What is said in a recording, in English; `stream`"),
        ApiRoute("POST", "/tokenize", "Tokens of a text or of messages", model_from="body", body_limit=TEXT_BODY_LIMIT),
        ApiRoute("POST", "/detokenize", "Text of tokens", model_from="body", body_limit=TEXT_BODY_LIMIT),
        _batch("POST", "/v1/files", "Takes a file of requests, a JSON object a line: a form with `file` and `purpose`"),
        _batch("GET", "/v1/files", "Files of the key that asks; `purpose`, `limit`, `after`, `order`"),
        _batch("GET", "/v1/files/{file_id}", "One of them"),
        _batch("DELETE", "/v1/files/{file_id}", "Deletes a file"),
        _batch("GET", "/v1/files/{file_id}/content", "What a file has"),
        _batch("POST", "/v1/batches", "Answers the requests of a file, in a batch; wakes the pools of its models"),
        _batch("GET", "/v1/batches", "Batches of the key that asks; `limit`, `after`"),
        _batch("GET", "/v1/batches/{batch_id}", "One of them, with its counts and files"),
        _batch("POST", "/v1/batches/{batch_id}/cancel", "Cancels a batch; what is answered stays"),
        ApiRoute("GET", "/v1/models", "The models, with GPU, context, price and state; wakes nothing"),
        ApiRoute("GET", "/v1/models/{model}", "One of them, by any of its names; wakes nothing", gateway_only=True),
        ApiRoute(
            "GET",
            "/v1/usage",
            "What a key has used; `by` is key, model or day, `since` a date or such as 7d; admins see all keys",
            gateway_only=True,
        ),
        ApiRoute(
            "GET", "/v1/key", "The name of the key that asks, whether it is an admin key, limits", gateway_only=True
        ),
        ApiRoute(
            "GET",
            "/v1/requests",
            "Requests of a key: those that run, and of the last 1,000 that ended; `before`, `after`, `limit`, `id`; "
            "admins see all keys",
            gateway_only=True,
        ),
        ApiRoute(
            "GET",
            "/metrics",
            "Counters for Prometheus; with ?model=<name> those of its engine; wakes nothing; for admin keys",
            model_from="query",
            is_own_without_model=True,
            admin=True,
        ),
        _admin(
            "GET", "/admin/pools", "What the pools do now: state, phases of a wake, requests, KV cache; wakes nothing"
        ),
        _admin("POST", "/admin/pools/wake", "Wakes the pool of `model`; the answer does not wait for it"),
        _admin(
            "POST", "/admin/pools/stop", "Ends the engine of `model` once its requests have ended, or its grace has"
        ),
        _admin("GET", "/admin/boots", "The last boots of the query's `model`, with their phases"),
        _admin("GET", "/admin/keys", "All keys with their limits; for admin keys, as are the next ones"),
        _admin("POST", "/admin/keys", "Makes a key: `name` and limits; the answer has it once"),
        _admin("POST", "/admin/keys/rotate", "Makes another key of `name`; the old one ends after `grace_s`"),
        _admin("POST", "/admin/keys/revoke", "Ends all keys of `name`"),
        _admin("POST", "/admin/keys/limit", "Changes limits of `name`; null lifts one"),
        ApiRoute(
            "POST",
            "/admin/reload",
            "Reads models file, keys and limits again; a wrong file changes nothing",
            body_limit=0,
            gateway_only=True,
            admin=True,
        ),
        _admin("POST", "/admin/adapters", "Serves the LoRA adapter `name` of `model`, from `hub_id` at `revision`"),
        ApiRoute("GET", "/", "The console, for browsers; needs no key", needs_key=False, gateway_only=True),
        ApiRoute("GET", "/console/{file}", "A file of the console; needs no key", needs_key=False, gateway_only=True),
        ApiRoute("GET", "/health", "Whether the service answers; needs no key, wakes nothing", needs_key=False),
        ApiRoute("GET", "/docs", "Swagger UI for these routes; needs no key", needs_key=False),
        ApiRoute("GET", "/docs/{file}", "A file of Swagger UI; needs no key", needs_key=False, gateway_only=True),
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
    known = path.replace("{model}", _MODEL_NAME).replace("{file}", _FILE_NAME)
    return re.compile(re.sub(r"{\w+}", "[A-Za-z0-9_-]+", known))


_FILE_NAME = r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)+"
_MODEL_NAME = r"(?=.{1,512}$)(?:(?!\.{1,2}(?:/|$))[^/\n]+/){0,2}(?!\.{1,2}$)[^/\n]+"


def canonical_path(path: str) -> str:
    """Return the path of the route that is meant where a client added one slash, doubled or at the end; else `path`.

    A base URL that ends in a slash gives the first. A redirect would lose the body of a POST.
    """
    if "//" in path:
        single = path.replace("//", "/", 1)
    elif path.endswith("/"):
        single = path[:-1]
    else:
        return path
    return single if routes_at(single) else path


def base_url(scope: Mapping[str, Any]) -> str:
    """Return the URL of this service as the client of a request knows it; without a valid `Host` only its path."""
    host = header_of(scope["headers"], b"host")
    scheme = header_of(scope["headers"], b"x-forwarded-proto")  # of a proxy that ends TLS
    scheme = scheme if scheme in {"http", "https"} else scope.get("scheme", "http")
    return f"{scheme}://{host}" if _HOST.fullmatch(host) else ""


_HOST = re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}")


def header_of(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> str:
    """Return a header's value; those of several of this name joined with commas, empty when there is none."""
    found = [value for given, value in headers if given == name]
    return b", ".join(found).decode("latin-1") if found else ""


def is_open(routes: Mapping[str, ApiRoute]) -> bool:
    """Tell whether a path is there for requests without a key."""
    return any(not route.needs_key for route in routes.values())


def keys_of(headers: Mapping[bytes, bytes]) -> list[bytes]:
    """Return the API keys that a request's headers carry, in the order of `KEY_HEADERS`.

    A client may send several, such as Claude Code with an old session's token beside the key that it was given.
    """
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    keys = [token.strip()] if scheme.lower() == b"bearer" else []
    keys += [headers[name].strip() for name in KEY_HEADERS[1:] if name in headers]
    return [key for key in keys if key]


def client_of(headers: Mapping[bytes, bytes], *, is_named: bool) -> str:
    """Return whose request the engine has.

    Args:
        headers: Of the request.
        is_named: Whether the gateway alone calls this engine: it gives the name of its client. Else the client is
            known by a digest of its key, since with names of its choice it would have the shares of many.
    """
    if is_named and (name := headers.get(CLIENT_HEADER)):
        return BATCHES if BATCH_HEADER in headers else name.decode("latin-1")
    return hashlib.sha256(b" ".join(keys_of(headers))).hexdigest()


def is_websocket(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Tell whether a GET opens a websocket."""
    return any(name == b"upgrade" and value.lower() == b"websocket" for name, value in headers)


_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the id that the client gave its request, or a new one."""
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value.decode()
    return os.urandom(16).hex()


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
