"""Every refusal that needs no running engine: its status and code, and that no pool wakes for it."""

from __future__ import annotations

import ast
import asyncio
import gzip
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from yarl import URL

from service.gateway.clients import ClientRegistry
from service.gateway.constraints import CHOICES, GRAMMAR_LIMIT, NESTING, PROPERTIES, REGEX_LIMIT, TOOLS, VALUES
from service.gateway.request_fields import CONSTRAINT_LIMIT, MAX_N, REMOVED_FIELDS, TOOLS_LIMIT
from service.in_engine.vllm_service.api_error import ERROR_NAMES
from service.in_engine.vllm_service.form_data import FIELD_LIMIT, FILE_LIMIT, NAME_LIMIT
from service.in_engine.vllm_service.http_contract import ROUTES, TEXT_BODY_LIMIT
from service.in_engine.vllm_service.request_counts import DOCUMENTS
from service.in_engine.vllm_service.request_lists import ITEMS
from service.registry.models import ModelSpec, Registry
from service.usage.limits import KeyLimits
from tests.gateway.forms import CONTENT_TYPE, form
from tests.gateway.upstream import SPECS, RunningGateway, serve_gateway

SERVICE = Path(__file__).parents[2] / "service"
KEYS = {hashlib.sha256(key.encode()).hexdigest(): name for key, name in (("a-key", "alice"), ("b-key", "bob"))}
ALICE, BOB = {"Authorization": "Bearer a-key"}, {"Authorization": "Bearer b-key"}
LIMITS = {"alice": KeyLimits(admin=True), "bob": KeyLimits(requests_per_minute=1000)}
CLIENTS = ClientRegistry(KEYS, LIMITS, {"bob": frozenset({"other"})})
EXPIRED = ClientRegistry(KEYS, {"alice": KeyLimits(), "bob": KeyLimits(expires="2020-01-01")})
ADMIN = [(path, method) for path, routes in ROUTES.items() for method, route in routes.items() if route.admin]
REGISTRY = Registry(
    {
        **SPECS,
        "vectors": ModelSpec(key="vectors", path="x", task="embed"),
        "seeing": ModelSpec(
            key="seeing", path="x", task="generate", extra_args=("--allowed-media-domains", "cdn.example")
        ),
        "ranks": ModelSpec(key="ranks", path="x", task="classify"),
        "hears": ModelSpec(key="hears", path="x", task="transcription"),
        "vast": ModelSpec(key="vast", path="x", task="generate"),
        "spare": ModelSpec(key="spare", path="x", task="generate", fallback=("tiny",)),
    }
)
JSON = {"Content-Type": "application/json"}
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, COUNT, EMBEDDINGS = "/v1/messages", "/v1/messages/count_tokens", "/v1/embeddings"
RERANK, SCORE, CLASSIFY = "/v1/rerank", "/v1/score", "/classify"
TRANSCRIPTIONS, TRANSLATIONS = "/v1/audio/transcriptions", "/v1/audio/translations"
FORMS = (TRANSCRIPTIONS, TRANSLATIONS)
WITH_BODY = [path for path, routes in ROUTES.items() if any(route.model_from == "body" for route in routes.values())]
HI = [{"role": "user", "content": "hi"}]


@dataclass(frozen=True)
class Refusal:
    """A request, and how it is refused.

    Attributes:
        body: Fields to send as JSON or as a form, by the route, other JSON, or bytes as they are.
        clients: Whom the service knows; without keys it checks hosts.
    """

    what: str
    status: int
    code: str
    body: object = None
    path: str = CHAT
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=dict)
    clients: ClientRegistry = CLIENTS


def fields(what: str, code: str = "invalid_value", path: str = CHAT, **values: object) -> Refusal:
    """Return the refusal of a body with these fields."""
    return Refusal(what, 400, code, {"model": "tiny", **values}, path)


def nested(levels: int) -> object:
    """Return a schema of so many levels."""
    schema: dict[str, object] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def schema(value: object) -> dict[str, object]:
    """Return the field that constrains a chat by a schema."""
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


def who() -> Iterator[Refusal]:
    """Yield refusals of clients and pages."""
    for path in ("/v1/models", "/v1/models/tiny", "/metrics", "/v1/nope"):
        yield Refusal(f"no key {path}", 401, "invalid_api_key", path=path, method="GET", headers={"Authorization": ""})
    for path in WITH_BODY:
        yield Refusal(f"no key {path}", 401, "invalid_api_key", {}, path, headers={"Authorization": ""})
        yield Refusal(f"wrong key {path}", 401, "invalid_api_key", {}, path, headers={"Authorization": "Bearer x"})
    yield Refusal("model of others", 403, "model_not_allowed", {"model": "tiny"}, headers=BOB)
    yield Refusal("model of others", 403, "model_not_allowed", path="/v1/models/tiny", method="GET", headers=BOB)
    yield Refusal("expired key", 401, "key_expired", {"model": "other"}, headers=BOB, clients=EXPIRED)
    for path, method in ADMIN:
        yield Refusal(f"no admin {method} {path}", 403, "admin_only", {"name": "x"}, path, method, headers=BOB)
    keyless = ClientRegistry({})
    for path in (*WITH_BODY, "/v1/models", "/health"):
        for header, value in (("Host", "evil.example"), ("Origin", "https://evil.example")):
            code, headers = f"{header.lower()}_not_allowed", {header: value}
            yield Refusal(f"{header} {path}", 403, code, {"model": "tiny"}, path, headers=headers, clients=keyless)


def paths() -> Iterator[Refusal]:
    """Yield refusals of paths and methods."""
    for path in (
        "/chat/completions",
        "/v1/v1/messages",
        "/invocations",
        "/index",
        "/v1/chat/completions//",
        "/V1/models",
    ):
        yield Refusal(f"path {path}", 404, "route_not_found", {}, path)
    for path in WITH_BODY:
        for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS"):
            yield Refusal(f"{method} {path}", 405, "method_not_allowed", {}, path, method)
    yield Refusal("POST /v1/models", 405, "method_not_allowed", {}, "/v1/models")
    yield Refusal("POST /health", 405, "method_not_allowed", {}, "/health")
    for path in (CHAT, RESPONSES, "/v1/models"):
        headers = {"Connection": "Upgrade", "Upgrade": "websocket"}
        yield Refusal(f"websocket {path}", 426, "upgrade_required", path=path, method="GET", headers=headers)


def bodies() -> Iterator[Refusal]:
    """Yield refusals of bodies as a whole."""
    for path in WITH_BODY:
        encoded = {"Content-Type": "application/x-www-form-urlencoded"}
        yield Refusal(f"form {path}", 415, "unsupported_media_type", b"model=tiny", path, headers=encoded)
        yield Refusal(f"empty {path}", 400, "invalid_form" if path in FORMS else "invalid_json", b"", path)
        if path not in FORMS:
            yield Refusal(f"list {path}", 400, "invalid_json", [], path)
    for path in FORMS:
        yield Refusal(f"JSON {path}", 415, "unsupported_media_type", b"{}", path, headers=JSON)
        yield Refusal(f"no form {path}", 400, "invalid_form", b"{}", path)
        yield Refusal(f"no file {path}", 400, "invalid_value", form({}).replace(b'; filename="a.wav"', b""), path)
        large = b" " * (FILE_LIMIT + 1)
        yield Refusal(f"large {path}", 413, "body_too_large", form({"model": "hears"}, large), path)
    for media_type in ("text/plain", "multipart/form-data; boundary=x", ""):
        yield Refusal(
            f"type {media_type}", 415, "unsupported_media_type", {"model": "tiny"}, headers={"Content-Type": media_type}
        )
    for what, body in (
        ("cut", b'{"model": "tiny"'),
        ("twice", b"{}{}"),
        ("NaN", b'{"temperature": NaN}'),
        ("UTF-16", '{"model": "tiny"}'.encode("utf-16")),
        ("UTF-32", '{"model": "tiny"}'.encode("utf-32-be")),
        ("surrogate", b'{"model": "\\ud800"}'),
        ("deep", b'{"a": ' * 200_000),
    ):
        yield Refusal(what, 400, "invalid_json", body)
    yield Refusal("br", 415, "unsupported_content_encoding", b"x", headers={"Content-Encoding": "br"})
    yield Refusal("no gzip", 400, "invalid_content_encoding", b"{}", headers={"Content-Encoding": "gzip"})
    large = b" " * (TEXT_BODY_LIMIT + 1)
    packed, coding = gzip.compress(large), {"Content-Encoding": "gzip"}
    yield Refusal("large", 413, "body_too_large", large, "/tokenize")
    yield Refusal("bomb", 413, "body_too_large", packed, "/tokenize", headers=coding)


def names() -> Iterator[Refusal]:
    """Yield refusals of models."""
    for path in WITH_BODY:
        yield Refusal(f"unknown {path}", 404, "model_not_found", {"model": "nope"}, path)
        if path not in FORMS:
            yield fields(f"model is a number {path}", path=path, model=1)
        yield fields(f"model is long {path}", path=path, model="x" * (NAME_LIMIT + 1))
    yield Refusal("unknown entry", 404, "model_not_found", path="/v1/models/Org%2FNope", method="GET")
    yield Refusal("bytes of a name", 400, "invalid_value", b'{"model": "\xff"}')
    for path in (CHAT, COMPLETIONS, RESPONSES, MESSAGES, COUNT):
        yield fields(f"task of the model {path}", "unsupported_by_model", path, model="vectors")
        yield fields(f"model that does not fit {path}", "model_too_large", path, model="vast")
    for path in (EMBEDDINGS, RERANK, SCORE, CLASSIFY, *FORMS):
        yield fields(f"task of the model {path}", "unsupported_by_model", path, model="tiny")
    yield fields("task of a model that embeds", "unsupported_by_model", CLASSIFY, model="vectors")
    yield fields("task of a model that classifies", "unsupported_by_model", EMBEDDINGS, model="ranks")
    yield fields("task of a model that hears", "unsupported_by_model", CHAT, model="hears")
    spare = {"model": "spare", "messages": HI}
    yield Refusal("fallback", 400, "invalid_header", spare, headers={"X-Fallback": "maybe"})
    for method, path in (
        ("GET", "/v1/responses/resp_1"),
        ("POST", "/v1/responses/resp_1/cancel"),
        ("GET", "/metrics?model=tiny"),
    ):
        yield Refusal(f"what only an engine has {path}", 404, "not_found", path=path, method=method)


def values() -> Iterator[Refusal]:
    """Yield refusals of fields that are no constraints."""
    for name in ("n", "best_of"):
        for value in (0, -1, MAX_N + 1, 1.5, "2", True, [], 10**30, 1e308):
            yield fields(f"{name}={value}", **{name: value})
    yield Refusal("n=1e400", 400, "invalid_value", b'{"model": "tiny", "n": 1e400}')
    for value in ("yes", 1, []):
        yield fields(f"stream={value}", stream=value)
    for path in FORMS:
        for name, value in (("n", MAX_N + 1), ("n", "x"), ("stream", "maybe"), ("prompt", "x" * (FIELD_LIMIT + 1))):
            yield fields(f"{name} {path}", path=path, model="hears", **{name: value})
    for name in REMOVED_FIELDS:
        yield fields(name, "unsupported_parameter", **{name: "x"})


def lists() -> Iterator[Refusal]:
    """Yield refusals of lists, and of what is in them."""
    for path, name in ((CHAT, "messages"), (RESPONSES, "input"), (MESSAGES, "messages"), (COUNT, "messages")):
        yield fields(f"{path} {name} too many", path=path, **{name: HI * (ITEMS + 1)})
        yield fields(f"{path} {name} of numbers", path=path, **{name: [0]})
        yield fields(f"{path} {name} of empty objects", path=path, **{name: [{}]})
    yield fields("parts", messages=[{"role": "user", "content": [0]}])
    yield fields("prompts", path=COMPLETIONS, prompt=["hi"] * 1025)
    yield fields("prompts times n", path=COMPLETIONS, prompt=["hi"] * 65, n=16)
    yield fields("texts to embed", path=EMBEDDINGS, model="vectors", input=[[1]] * 2049)
    for path, name in ((RERANK, "documents"), (SCORE, "documents"), (SCORE, "items"), (SCORE, "text_2")):
        for what, items in (("texts", ["a"]), ("objects", [{"content": []}])):
            yield fields(f"{path} {name} too many {what}", path=path, model="ranks", **{name: items * (DOCUMENTS + 1)})
        yield fields(f"{path} {name} mixed", path=path, model="ranks", **{name: ["a", {"content": []}]})
    yield fields("long query", path=RERANK, model="ranks", query="x" * 8192, documents=["a"] * 600)
    yield fields("texts to classify", path=CLASSIFY, model="ranks", input=["a"] * 2049)
    yield fields("values", messages=HI, logit_bias={str(token): 1 for token in range(50_001)})
    yield fields("tool is a number", tools=[0], messages=HI)
    yield fields("choice without tools", tools=[], tool_choice="required", messages=HI)


def media() -> Iterator[Refusal]:
    """Yield refusals of URLs: of a model that lists no host, and of one that lists another."""
    for url in ("http://evil.example/a.png", "file:///etc/passwd"):
        image, source = {"type": "image_url", "image_url": {"url": url}}, {"type": "url", "url": url}
        asked = {"role": "user", "content": [image]}
        for model in ("tiny", "seeing"):
            for path in (CHAT, "/tokenize"):
                yield fields(f"media {path}", "media_url_not_allowed", path, model=model, messages=[asked])
            part = {"type": "input_image", "image_url": url}
            item = {"type": "message", "role": "user", "content": [part]}
            yield fields("media of Responses", "media_url_not_allowed", RESPONSES, model=model, input=[item])
            for path in (MESSAGES, COUNT):
                message = {"role": "user", "content": [{"type": "image", "source": source}]}
                code = "media_url_not_allowed"
                yield fields(f"media {path}", code, path, model=model, messages=[message], max_tokens=1)
        yield fields("media of embeddings", "media_url_not_allowed", EMBEDDINGS, model="vectors", messages=[asked])
        for name, given in (("query", {"content": [image]}), ("documents", [{"content": [image]}])):
            yield fields(f"media of a {name}", "media_url_not_allowed", RERANK, model="ranks", **{name: given})
        yield fields("media to score", "media_url_not_allowed", SCORE, model="ranks", queries=[{"content": [image]}])
    many = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}] * 257
    yield fields("too many media", "too_many_media", model="seeing", messages=[{"role": "user", "content": many}])


def constraints() -> Iterator[Refusal]:
    """Yield refusals of constraints that are over a bound, or have a wrong type."""
    code = "invalid_grammar"
    tool = {"type": "function", "function": {"name": "x", "parameters": nested(NESTING + 1)}}
    properties = {f"p{number}": {} for number in range(PROPERTIES + 1)}
    for what, given in (
        ("schema is text", schema("{")),
        ("schema is a number", schema(1)),
        ("schema is deep", schema(nested(NESTING + 1))),
        ("schema is wide", schema({"type": "object", "properties": properties, "required": [*properties]})),
        ("schema has many values", schema({"enum": [*range(VALUES + 1)]})),
        ("schema is long", schema({"description": "x" * CONSTRAINT_LIMIT})),
        ("tools are long", {"tools": [tool | {"x": "x" * TOOLS_LIMIT}]}),
        ("tools are many", {"tools": [{"type": "function", "function": {"name": "x"}}] * (TOOLS + 1)}),
        ("tool is deep", {"tools": [tool]}),
        ("regex is long", {"structured_outputs": {"regex": "x" * (REGEX_LIMIT + 1)}}),
        ("regex is a number", {"structured_outputs": {"regex": 1}}),
        ("regex has NUL", {"structured_outputs": {"regex": "a\0"}}),
        ("grammar is long", {"structured_outputs": {"grammar": "x" * (GRAMMAR_LIMIT + 1)}}),
        ("grammar is empty", {"structured_outputs": {"grammar": ""}}),
        ("choices are many", {"structured_outputs": {"choice": ["x"] * (CHOICES + 1)}}),
        ("choices are none", {"structured_outputs": {"choice": []}}),
        ("choices are numbers", {"structured_outputs": {"choice": [1]}}),
        ("json is a number", {"structured_outputs": {"json": 1}}),
        ("tag is text", {"structured_outputs": {"structural_tag": "x"}}),
    ):
        yield fields(what, code, messages=HI, **given)
    yield fields("structured_outputs is a list", structured_outputs=[], messages=HI)
    deep = {"format": {"type": "json_schema", "name": "x", "schema": nested(NESTING + 1)}}
    yield fields("text of Responses", code, RESPONSES, input="hi", text=deep)
    yield fields("output of Messages", code, MESSAGES, messages=HI, max_tokens=1, output_config=deep)


REFUSALS = [
    refusal
    for group in (who, paths, bodies, names, values, lists, media, constraints)
    for refusal in group()
]  # fmt: skip
# The codes that come without a wake and are tested elsewhere, since they need raw bytes, time or other requests: of
# bodies (test_uploads) and of the server (test_http_requests, test_http_connections).
ELSEWHERE = {
    *("body_too_slow", "client_left", "too_many_bytes", "headers_too_slow", "headers_too_large", "http_version"),
    *("invalid_http", "too_many_connections", "rate_limit_exceeded", "ledger_unavailable"),
    *("insufficient_quota", "no_key_store", "reload_refused", "adapter_refused"),  # test_limits, test_admin
    "keys_unavailable",  # test_admin
    "pool_is_waking",  # test_pool_status
}
# Those of pools and engines: a wake was asked for, or an engine answered.
LATER = {
    *("tier_not_deployed", "model_failed", "model_waking", "overloaded", "shutting_down"),
    *("platform_error", "platform_rate_limited", "platform_timeout"),
    *("gpu_limit_reached", "daily_limit_reached", "overloaded"),
}


@asynccontextmanager
async def gateway_for(refusal: Refusal):  # type: ignore[no-untyped-def]
    """Serve a gateway whose model `vast` fits nowhere."""
    async with serve_gateway(refusal.clients, registry=REGISTRY, hold_s=0) as gateway:
        async with gateway.http.get(gateway.url + "/v1/models", headers=ALICE) as answer:
            assert answer.status == 200  # every pool is there from now on
        gateway.pools["vast"].unfit = "200 GiB of weights are more than the 24 GiB here."
        yield gateway


async def send(gateway: RunningGateway, refusal: Refusal) -> tuple[int, str]:
    """Make a request and return its status and its error's code, or Anthropic's type."""
    body, is_form = refusal.body, refusal.path in FORMS
    if is_form and isinstance(body, dict):
        body = form(body)
    elif not isinstance(body, bytes | None):
        body = json.dumps(body).encode()
    content_type = {"Content-Type": CONTENT_TYPE} if is_form else JSON
    headers = {name: value for name, value in {**ALICE, **content_type, **refusal.headers}.items() if value}
    async with gateway.http.request(
        refusal.method,
        URL(gateway.url + refusal.path, encoded=True),
        data=None if body is None else io.BytesIO(body),
        headers=headers,
        skip_auto_headers=("Content-Type",),
        allow_redirects=False,
    ) as answer:
        error = (await answer.json())["error"]
    return answer.status, error["code"] if "code" in error else error["type"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.what)
def test_refusal_wakes_nothing(refusal: Refusal, stream: bool) -> None:
    """Status and code are those of the table, of a stream too, and no pool is asked to wake."""
    if stream and isinstance(refusal.body, dict):
        refusal = replace(refusal, body={"stream": True, **refusal.body})

    async def run() -> None:
        async with gateway_for(refusal) as gateway:
            status, code = await send(gateway, refusal)
            anthropics = ERROR_NAMES[refusal.status].anthropic
            assert (status, code) in {(refusal.status, refusal.code), (refusal.status, anthropics)}
            assert code == refusal.code or refusal.path.startswith("/v1/messages")
            assert {key: pool.wakes for key, pool in gateway.pools.items() if pool.wakes} == {}

    asyncio.run(run())


def test_refusal_by_a_limit_wakes_nothing() -> None:
    """A refused request counts too, so that a key which only makes mistakes is limited as well."""
    clients = ClientRegistry(KEYS, {"alice": KeyLimits(requests_per_minute=1)})

    async def run() -> None:
        async with gateway_for(Refusal("limit", 429, "rate_limit_exceeded", {"model": 1}, clients=clients)) as gateway:
            bad, good = Refusal("", 400, "", {"model": 1}), Refusal("", 429, "", {"model": "tiny", "messages": HI})
            assert await send(gateway, bad) == (400, "invalid_value")
            assert await send(gateway, good) == (429, "rate_limit_exceeded")
            assert not any(pool.wakes for pool in gateway.pools.values())

    asyncio.run(run())


def test_refusals_of_the_table_are_all_that_the_gateway_has() -> None:
    """Every code in the gateway's source is in the table, has a test elsewhere, or comes after a wake."""
    sources = [*(SERVICE / "gateway").rglob("*.py"), SERVICE / "in_engine" / "vllm_service" / "api_error.py"]
    found = {code for source in sources for code in codes_in(ast.parse(source.read_text()))}
    covered = {refusal.code for refusal in REFUSALS}

    assert found - covered - LATER - ELSEWHERE == set()
    assert {"model_not_found", "invalid_json", "origin_not_allowed"} <= found


def codes_in(tree: ast.AST) -> Iterator[str]:
    """Yield the codes that a module gives its errors: literals, by keyword or as an argument."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            continue
        given = [keyword.value for keyword in call.keywords if keyword.arg == "code"]
        if call.func.id in {"_api_error", "_forbidden"}:
            given += call.args[2:]
        yield from (node.value for node in given if isinstance(node, ast.Constant) and isinstance(node.value, str))
