"""The guard as an ASGI middleware, in front of a small application that records its requests."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import pytest
from vllm_service import http_contract
from vllm_service.guard import Guard, Message

KEY = "open-sesame"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()
LISTED = [route for routes in http_contract.ROUTES.values() for route in routes.values()]
ROUTES = [(route.path.format(response_id="resp_a-1"), route.method) for route in LISTED]
OPEN = [route.path for route in LISTED if not route.needs_key]
# Other routes of vLLM, most of them open even with its own `--api-key`.
CLOSED = [
    "/invocations", "/generative_scoring", "/load", "/version", "/redoc", "/scale_elastic_ep", "/pooling", "/classify",
    "/score", "/rerank", "/v1/score", "/v2/rerank", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/sleep",
    "/wake_up", "/collective_rpc", "/reset_prefix_cache", "/server_info", "/inference/v1/generate", "/cohere", "/", "",
    "/health/", "/v1/models/", "/v1/models/x", "/V1/models", "//v1/models", "/v1/responses/a/b", "/v1/responses/a b",
    "/v1/responses/../models", "/v1/responses/a/cancel/", "/docs/oauth2-redirect", "/v1/models\n", "/v1/responses/a\n",
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

    def __init__(self, sent: list[Message]) -> None:
        starts = [message for message in sent if message["type"] == "http.response.start"]
        assert len(starts) == 1, f"{len(starts)} answers to one request: {sent}"
        bodies = [message for message in sent if message["type"] == "http.response.body"]
        assert [message.get("more_body", False) for message in bodies] == [True] * (len(bodies) - 1) + [False]
        self.status: int = starts[0]["status"]
        self.headers = dict(starts[0]["headers"])
        self.body: bytes = b"".join(message.get("body", b"") for message in bodies)

    @property
    def error(self) -> Message:
        """The error in OpenAI's shape."""
        error: Message = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
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
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
    scope = {"type": "http", "path": path, "method": method, "headers": raw}
    asyncio.run(guard(scope, receive, send))
    return Answer(sent)


def bearer(key: str = KEY) -> dict[str, str]:
    """Return the header that carries a key."""
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("path", "method"), ROUTES)
def test_guard_lets_a_listed_route_through(path: str, method: str) -> None:
    """The contract's routes, with a key."""
    behind = Behind()

    assert ask(Guard(behind, [DIGEST]), path, method, bearer()).status == 200
    assert behind.scopes[0]["path"] == path


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


def test_guard_lets_options_through_without_a_key() -> None:
    """A browser sends OPTIONS before it sends its key."""
    assert ask(Guard(Behind(), [DIGEST]), "/v1/chat/completions", "OPTIONS").status == 200


@pytest.mark.parametrize("path", OPEN)
def test_guard_asks_no_key_on_open_routes(path: str) -> None:
    """Health and documentation."""
    assert ask(Guard(Behind(), [DIGEST]), path).status == 200


@pytest.mark.parametrize(("path", "method"), [route for route in ROUTES if route[0] not in OPEN])
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
        bearer(DIGEST),
        bearer("schl\xfcssel"),
        {"Authorization": "Bearer"},
    ],
)
def test_guard_refuses_a_request_without_a_valid_key(path: str, method: str, headers: dict[str, str]) -> None:
    """401 in OpenAI's shape, and nothing of it reaches the engine."""
    behind = Behind()
    answer = ask(Guard(behind, [DIGEST]), path, method, headers)

    assert (answer.status, answer.error["code"], behind.scopes) == (401, "invalid_api_key", [])
    assert answer.headers[b"www-authenticate"] == b"Bearer"


@pytest.mark.parametrize(
    "headers",
    [bearer(), {"Authorization": f"bearer {KEY}"}, {"Authorization": f"BEARER  {KEY} "}, {"X-Api-Key": KEY}],
)
def test_guard_takes_a_key_as_the_clients_send_it(headers: dict[str, str]) -> None:
    """OpenAI's clients send Bearer, Anthropic's x-api-key."""
    assert ask(Guard(Behind(), ["0" * 64, DIGEST]), "/v1/models", headers=headers).status == 200


def test_guard_with_the_digest_of_an_empty_key_admits_no_request_without_a_key() -> None:
    """The digest of an empty file must not admit requests without a key."""
    nothing = hashlib.sha256(b"").hexdigest()

    assert ask(Guard(Behind(), [nothing]), "/v1/models").status == 401


def test_guard_without_keys_asks_for_none() -> None:
    """On loopback only: the parent refuses any other address."""
    assert ask(Guard(Behind(), []), "/v1/models").status == 200
