"""The guard as an ASGI middleware, in front of a small application that records its requests."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest
from vllm_service import client_turns, form_data, http_contract
from vllm_service.api_error import Message
from vllm_service.guard import Guard

from tests.engine.routes import error_of
from tests.gateway.forms import CONTENT_TYPE, form

KEY = "open-sesame"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()
LISTED = [route for routes in http_contract.ROUTES.values() for route in routes.values() if not route.gateway_only]
ROUTES = [(route.path.format(response_id="resp_a-1"), route.method) for route in LISTED]
# Other routes of vLLM, most of them open even with its own `--api-key`.
CLOSED = [
    "/invocations", "/generative_scoring", "/load", "/version", "/redoc", "/scale_elastic_ep", "/pooling", "/v2/embed",
    "/score", "/rerank", "/v2/rerank", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/sleep",
    "/wake_up", "/collective_rpc", "/reset_prefix_cache", "/server_info", "/inference/v1/generate", "/cohere", "/", "",
    "/health//", "/v1/models//", "/v1/models/x", "/V1/models", "///v1/models", "/v1/responses/a/b", "/v1/responses/a b",
    "/v1/responses/../models", "/v1/responses/a/cancel//", "/docs/oauth2-redirect", "/v1/models\n", "/v1/responses/a\n",
]  # fmt: skip


class Behind:
    """The application behind the guard: reads the body, answers 200, records its requests."""

    def __init__(self, *, body: bytes = b"behind", reads: bool = True, pieces: int = 1) -> None:
        self.body, self.reads, self.pieces = body, reads, pieces
        self.scopes: list[Message] = []
        self.read = b""
        self.disconnected = False

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        """Answer one scope."""
        self.scopes.append(scope)
        if scope["type"] == "lifespan":
            await send({"type": "lifespan.startup.complete"})
            return
        more = self.reads
        while more:
            message = await receive()
            self.disconnected = message["type"] == "http.disconnect"
            self.read += message.get("body", b"")
            more = message.get("more_body", False) and not self.disconnected
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in range(self.pieces):
            last = piece == self.pieces - 1
            await send({"type": "http.response.body", "body": self.body if last else b"", "more_body": not last})


class Answer:
    """What the client got."""

    def __init__(self, sent: list[Message], path: str = "") -> None:
        self.path = path
        starts = [message for message in sent if message["type"] == "http.response.start"]
        assert len(starts) == 1, f"{len(starts)} answers to one request: {sent}"
        bodies = [message for message in sent if message["type"] == "http.response.body"]
        assert [message.get("more_body", False) for message in bodies] == [True] * (len(bodies) - 1) + [False]
        self.status: int = starts[0]["status"]
        self.headers = dict(starts[0]["headers"])
        self.body: bytes = b"".join(message.get("body", b"") for message in bodies)

    @property
    def error(self) -> Message:
        """The error in the shape of its route."""
        error = error_of(self.body, self.path)
        assert self.headers[b"content-type"] == b"application/json"
        assert int(self.headers[b"content-length"]) == len(self.body)
        return error


def ask(
    guard: Guard,
    path: str,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    chunks: tuple[bytes, ...] = (b"",),
) -> Answer:
    """Send one request through the guard, its body in chunks."""
    waiting = [{"type": "http.request", "body": c, "more_body": i < len(chunks) - 1} for i, c in enumerate(chunks)]
    sent: list[Message] = []

    async def receive() -> Message:
        return waiting.pop(0) if waiting else await asyncio.get_running_loop().create_future()  # the client stays

    async def send(message: Message) -> None:
        sent.append(message)

    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
    scope = {"type": "http", "path": path, "method": method, "headers": raw}
    asyncio.run(guard(scope, receive, send))
    return Answer(sent, path)


def bearer(key: str = KEY) -> dict[str, str]:
    """Return the header that carries a key."""
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("path", "method"), ROUTES)
def test_guard_lets_a_listed_route_through(path: str, method: str) -> None:
    """The contract's routes, with a key."""
    behind = Behind()

    headers, chunks = bearer(), (b"",)
    if http_contract.routes_at(path)[method].is_form:
        headers, chunks = headers | {"Content-Type": CONTENT_TYPE}, (form({"model": "tiny"}),)
    assert ask(Guard(behind, [DIGEST]), path, method, headers, chunks).status == 200
    assert behind.scopes[0]["path"] == path
    assert behind.read == b"".join(chunks)


@pytest.mark.parametrize(
    ("content_type", "body", "status", "code"),
    [
        (CONTENT_TYPE, form({"n": "1000000"}), 400, "invalid_value"),
        (CONTENT_TYPE, form({"model": "tiny"}) * 2, 400, "invalid_form"),
        (CONTENT_TYPE, form({}, bytes(form_data.FILE_LIMIT + 1)), 413, "body_too_large"),
        (f"{CONTENT_TYPE}; charset=utf-16", form({}), 400, "invalid_form"),
        ("application/json", b"{}", 400, "invalid_form"),
    ],
)
def test_guard_refuses_a_form_that_vllm_would_not_bound(content_type: str, body: bytes, status: int, code: str) -> None:
    """A client that asks an engine without the gateway, such as on Modal, has the same bounds."""
    behind, headers = Behind(), bearer() | {"Content-Type": content_type}

    answer = ask(Guard(behind, [DIGEST]), "/v1/audio/transcriptions", "POST", headers, (body,))

    assert (answer.status, answer.error["code"]) == (status, code)
    assert not behind.scopes


def test_guard_refuses_a_form_with_two_content_types() -> None:
    """VLLM would read it by the first one's boundary."""
    behind = Behind()
    headers = bearer() | {"Content-Type": "multipart/form-data; boundary=other", "content-type": CONTENT_TYPE}

    answer = ask(Guard(behind, [DIGEST]), "/v1/audio/transcriptions", "POST", headers, (form({"model": "tiny"}),))

    assert (answer.status, answer.error["code"]) == (400, "invalid_form")
    assert not behind.scopes


def test_guard_passes_a_large_form_on_in_pieces() -> None:
    """Each piece is one that vLLM parses in one go."""
    behind, body = Behind(), form({"model": "tiny"}, bytes(10_000_000))
    headers = bearer() | {"Content-Type": CONTENT_TYPE}

    answer = ask(Guard(behind, [DIGEST]), "/v1/audio/transcriptions", "POST", headers, (body[:100], body[100:]))

    assert answer.status == 200
    assert behind.read == body


def test_guard_bounds_the_trace_context_where_vllm_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of both headers goes from step to step there, also of 100 KB."""
    parent, behind = f"00-{'a' * 32}-{'b' * 16}-01", Behind()
    sent = bearer() | {"traceparent": parent, "tracestate": "x" * 100_000}
    for enabled in (False, True):
        monkeypatch.setattr("vllm_service.traces.enabled", enabled)
        assert ask(Guard(behind, [DIGEST]), "/v1/models", headers=sent).status == 200
    before, after = (dict(scope["headers"]) for scope in behind.scopes)
    assert before.keys() - after.keys() == {b"tracestate"}
    assert after[b"traceparent"] == parent.encode()


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_guard_refuses_every_other_route(path: str, method: str) -> None:
    """It denies by default, with a key and without: routes that vLLM adds later are closed."""
    behind = Behind()
    answer = ask(Guard(behind, [DIGEST]), path, method, bearer())

    assert (answer.status, answer.error["type"], behind.scopes) == (404, "not_found_error", [])


@pytest.mark.parametrize(("path", "method"), ROUTES)
def test_guard_refuses_other_methods(path: str, method: str) -> None:
    """Each route has its methods, and the error names them."""
    for other in {"GET", "POST", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "get"} - {method}:
        behind = Behind()
        answer = ask(Guard(behind, []), path, other)

        assert (answer.status, behind.scopes) == (405, []), other
        assert method in answer.error["message"]


@pytest.mark.parametrize(("path", "method"), ROUTES)
def test_guard_lets_head_through_where_get_is(path: str, method: str) -> None:
    """HEAD is GET without a body; a route that only takes POST has none."""
    status = ask(Guard(Behind(), []), path, "HEAD").status

    assert status == (200 if method == "GET" else 405)


def test_guard_asks_head_for_a_key_too() -> None:
    """HEAD reveals what GET reveals."""
    assert ask(Guard(Behind(), [DIGEST]), "/v1/models", "HEAD").status == 401


@pytest.mark.parametrize(("path", "method"), ROUTES)
def test_guard_answers_options_itself(path: str, method: str) -> None:
    """A browser sends OPTIONS before it sends its key; vLLM sees none of it, and no origin is allowed."""
    behind = Behind()
    headers = {"Origin": "https://page.example", "Access-Control-Request-Method": method}
    answer = ask(Guard(behind, [DIGEST]), path, "OPTIONS", headers)

    assert (answer.status, answer.body, behind.scopes) == (204, b"", [])
    assert method in answer.headers[b"allow"].decode().split(", ")
    assert not [name for name in answer.headers if name.startswith(b"access-control")]


def test_guard_asks_no_key_for_health_alone() -> None:
    """VLLM's pages for people and programs describe every route that it has, so they need a key as these routes do."""
    assert ask(Guard(Behind(), [DIGEST]), "/health").status == 200
    assert [ask(Guard(Behind(), [DIGEST]), path).status for path in ("/docs", "/openapi.json")] == [401, 401]


@pytest.mark.parametrize(("path", "method"), [route for route in ROUTES if route[0] != "/health"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        bearer(""),
        bearer(KEY + "x"),
        bearer(KEY.upper()),
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"X-Api-Key": "wrong"},
        {"X-Api-Key": ""},
        {"Api-Key": "wrong"},
        bearer("wrong") | {"X-Api-Key": "wrong", "Api-Key": "wrong"},
        {"X-Api-Key": f"Bearer {KEY}"},
        bearer(DIGEST),
        bearer("schl\xfcssel"),
        {"Authorization": "Bearer"},
    ],
)
def test_guard_refuses_a_request_without_a_valid_key(path: str, method: str, headers: dict[str, str]) -> None:
    """401 in the shape of the route's protocol, and nothing of it reaches the engine."""
    behind = Behind()
    answer = ask(Guard(behind, [DIGEST]), path, method, headers)

    assert (answer.status, answer.error["type"], behind.scopes) == (401, "authentication_error", [])
    assert answer.error.get("code", "invalid_api_key") == "invalid_api_key"
    assert answer.headers[b"www-authenticate"] == b"Bearer"


@pytest.mark.parametrize(
    "headers",
    [
        bearer(),
        {"Authorization": f"bearer {KEY}"},
        {"Authorization": f"BEARER  {KEY} "},
        {"X-Api-Key": KEY},
        {"Api-Key": KEY},
        bearer("stale") | {"X-Api-Key": KEY},
        bearer("stale") | {"X-Api-Key": "stale", "Api-Key": KEY},
        {"Authorization": "Basic c3RhbGU=", "X-Api-Key": KEY},
        bearer() | {"X-Api-Key": "stale", "Api-Key": "stale"},
    ],
)
def test_guard_takes_a_key_as_the_clients_send_it(headers: dict[str, str]) -> None:
    """OpenAI's clients send Bearer, Anthropic's x-api-key, Azure's api-key; one valid key among several is enough."""
    assert ask(Guard(Behind(), ["0" * 64, DIGEST]), "/v1/models", headers=headers).status == 200


def test_guard_with_the_digest_of_an_empty_key_admits_no_request_without_a_key() -> None:
    """The digest of an empty file must not admit requests without a key."""
    nothing = hashlib.sha256(b"").hexdigest()

    assert ask(Guard(Behind(), [nothing]), "/v1/models").status == 401


def test_guard_without_keys_asks_for_none() -> None:
    """On loopback only: the parent refuses any other address."""
    assert ask(Guard(Behind(), []), "/v1/models").status == 200


@pytest.mark.parametrize(
    ("first", "second", "are_one"),
    [
        ({"X-Api-Client": "alice"}, {"X-Api-Client": "bob"}, False),
        ({"X-Api-Client": "alice"}, {"X-Api-Client": "alice", **bearer("another")}, True),
        (bearer(), bearer("another"), False),
        (bearer(), {"X-Api-Key": KEY}, True),
    ],
)
def test_guard_tells_whose_request_it_is(first: dict[str, str], second: dict[str, str], are_one: bool) -> None:
    """The gateway names its clients; who calls the engine directly is known by a digest of the key."""
    seen: list[str] = []

    async def behind(scope: Message, receive: Any, send: Any) -> None:
        seen.append(client_turns.client.get())
        await Behind()(scope, receive, send)

    for headers in (first, second):
        ask(Guard(behind, []), "/v1/models", headers=headers)

    assert (seen[0] == seen[1]) is are_one
    assert KEY not in "".join(seen)


def test_guard_takes_the_name_of_a_client_from_the_gateway_only() -> None:
    """Where clients call the engine with keys of their own, one with many names would have the shares of many."""
    seen: list[str] = []

    async def behind(scope: Message, receive: Any, send: Any) -> None:
        seen.append(client_turns.client.get())
        await Behind()(scope, receive, send)

    for digests in ([DIGEST, "0" * 64], [DIGEST, "0" * 64, "1" * 64]):  # one is the parent's
        for name in ("alice", "bob"):
            ask(Guard(behind, digests), "/v1/models", headers={**bearer(), "X-Api-Client": name})

    assert seen[:2] == ["alice", "bob"]
    assert seen[2] == seen[3]
