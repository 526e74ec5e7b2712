"""The guard's limits on bodies, the body of /health, and scopes that are no HTTP request."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_service import parent_pipe
from vllm_service.guard import Guard
from vllm_service.http_contract import BODY_LIMIT, TEXT_BODY_LIMIT
from vllm_service.request_lists import LISTS

from tests.unit.in_engine.test_guard import DIGEST, KEY, Behind, ask, bearer

LIMITS = [("/v1/chat/completions", BODY_LIMIT), ("/tokenize", TEXT_BODY_LIMIT), ("/detokenize", TEXT_BODY_LIMIT)]


@pytest.mark.parametrize(("path", "limit"), LIMITS)
def test_body_declared_over_the_limit_is_refused_unread(path: str, limit: int) -> None:
    """The declared length is enough to refuse it."""
    behind = Behind()
    answer = ask(Guard(behind, []), path, "POST", {"Content-Length": str(limit + 1)})

    assert (answer.status, behind.scopes) == (413, [])
    assert ("32 MiB" if limit == BODY_LIMIT else "512 KiB") in answer.error["message"]


@pytest.mark.parametrize(("path", "limit"), LIMITS)
def test_body_declared_at_the_limit_passes(path: str, limit: int) -> None:
    """The limit itself is allowed."""
    assert ask(Guard(Behind(), []), path, "POST", {"Content-Length": str(limit)}).status == 200


@pytest.mark.parametrize(("path", "limit"), LIMITS)
def test_body_in_chunks_at_the_limit_passes_whole(path: str, limit: int) -> None:
    """Every byte arrives, in order."""
    behind = Behind()
    body = b'{"a":"' + b"a" * (limit - 8) + b'"}'
    answer = ask(Guard(behind, []), path, "POST", chunks=(body[:-1], body[-1:]))

    assert answer.status == 200
    assert len(behind.read) == limit
    assert behind.read == body


@pytest.mark.parametrize(("path", "limit"), LIMITS)
def test_body_in_chunks_over_the_limit_is_refused(path: str, limit: int) -> None:
    """Nothing was declared: it ends at the first chunk over the limit, and the application sees a client that left.

    Where lists are checked first, the application sees nothing.
    """
    behind = Behind()
    answer = ask(Guard(behind, []), path, "POST", chunks=(b"a" * limit, b"b", b"never read"))

    assert answer.status == 413
    if path in LISTS:
        assert behind.scopes == []
    else:
        assert (behind.read, behind.disconnected) == (b"a" * limit, True)


def test_body_longer_than_declared_is_refused() -> None:
    """A small declared length does not raise the limit."""
    answer = ask(Guard(Behind(), []), "/tokenize", "POST", {"Content-Length": "5"}, (b"a" * TEXT_BODY_LIMIT, b"b"))

    assert answer.status == 413


@pytest.mark.parametrize("declared", ["-1", "many", "1e3", "", "0" * 5000 + "9"])
def test_body_with_a_length_that_is_no_number_is_400(declared: str) -> None:
    """The guard refuses it even when the server in front accepts it; Python reads no more than 4,300 digits."""
    behind = Behind()
    answer = ask(Guard(behind, []), "/v1/completions", "POST", {"Content-Length": declared})

    assert (answer.status, answer.error["code"], behind.scopes) == (400, "invalid_http", [])


def test_body_that_is_compressed_is_415() -> None:
    """VLLM would parse the compressed bytes as JSON; the gateway decodes such bodies before they come here."""
    behind = Behind()
    answer = ask(Guard(behind, []), "/v1/completions", "POST", {"Content-Encoding": "gzip"}, (b"\x1f\x8b",))

    assert (answer.status, answer.error["code"], behind.scopes) == (415, "unsupported_content_encoding", [])
    assert answer.headers[b"accept-encoding"] == b"identity"
    assert ask(Guard(Behind(), []), "/v1/completions", "POST", {"Content-Encoding": "Identity"}).status == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_body_loses_its_byte_order_mark(path: str) -> None:
    """VLLM's parser refuses one; only the body's first bytes can be one."""
    behind = Behind()
    mark = "\ufeff".encode()
    answer = ask(Guard(behind, []), path, "POST", chunks=(mark + b'{"a":"', mark + b'"}'))

    assert (answer.status, behind.read) == (200, b'{"a":"' + mark + b'"}')


def test_body_is_refused_before_it_is_read_when_the_key_is_wrong() -> None:
    """The body of an unauthenticated request is not read."""
    behind = Behind()
    answer = ask(Guard(behind, [DIGEST]), "/tokenize", "POST", {"Content-Length": str(TEXT_BODY_LIMIT + 1)})

    assert (answer.status, behind.scopes) == (401, [])


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_health_has_the_contracts_body(pieces: int) -> None:
    """VLLM's body is empty; in however many messages it comes, there is one answer."""
    answer = ask(Guard(Behind(body=b"", pieces=pieces), [DIGEST]), "/health")

    assert (answer.status, answer.body) == (200, b'{"status":"ok"}')
    assert answer.headers == {
        b"content-type": b"application/json",
        b"content-length": b"15",
        b"x-engine-pid": str(os.getpid()).encode(),
    }


@pytest.mark.parametrize(("hosts", "status"), [(None, 400), (["other.example"], 400), (["cdn.example"], 200)])
def test_media_url_is_judged_by_the_hosts_of_the_engines_command_line(hosts: list[str] | None, status: int) -> None:
    """Before vLLM sees the request, where no gateway is in front."""
    behind = Behind()
    guard = Guard(behind, [])
    vllm = SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(allowed_media_domains=hosts)))
    part = {"type": "image_url", "image_url": {"url": "https://cdn.example/a.png"}}
    body = json.dumps({"messages": [{"role": "user", "content": [part]}]}).encode()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await guard({**scope, "app": vllm}, receive, send)

    answer = ask(app, "/v1/chat/completions", "POST", chunks=(body,))  # type: ignore[arg-type]
    assert (answer.status, len(behind.scopes)) == (status, int(status == 200))


def test_health_tells_the_context_of_the_engine() -> None:
    """The startup plugin has put it into the application's state; the gateway on Modal lists it."""
    guard = Guard(Behind(body=b""), [])
    vllm = SimpleNamespace(state=SimpleNamespace(max_model_len=4096))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await guard({**scope, "app": vllm}, receive, send)

    assert ask(app, "/health").headers[b"x-max-model-len"] == b"4096"  # type: ignore[arg-type]


def test_health_of_a_dead_engine_passes_unchanged() -> None:
    """503 must not become ok."""

    async def dying(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b"dead"})

    answer = ask(Guard(dying, []), "/health")

    assert (answer.status, answer.body) == (503, b"dead")


def test_stream_passes_message_by_message() -> None:
    """Nothing is buffered: each chunk passes as it came."""
    sent: list[dict[str, Any]] = []
    guard = Guard(Behind(body=b"last", pieces=3, reads=False), [])

    async def send(message: dict[str, Any]) -> None:
        sent.append(dict(message))

    asyncio.run(guard({"type": "http", "path": "/v1/models", "method": "GET", "headers": []}, lambda: None, send))  # type: ignore[arg-type, return-value]

    assert [message.get("body") for message in sent] == [None, b"", b"", b"last"]


@pytest.mark.parametrize("extensions", [{}, {"websocket.http.response": {}}])
def test_websocket_is_refused_before_the_application(extensions: dict[str, Any]) -> None:
    """VLLM has a realtime route; it is not in the contract. The refusal is 426 where the server can send a status."""
    behind = Behind()
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"authorization", b"Bearer " + KEY.encode())]
    scope = {"type": "websocket", "path": "/v1/responses", "headers": headers, "extensions": extensions}
    asyncio.run(Guard(behind, [DIGEST])(scope, receive, send))

    assert behind.scopes == []
    if not extensions:
        assert [message["type"] for message in sent] == ["websocket.close"]
        return
    start, body = sent
    assert (start["type"], body["type"]) == ("websocket.http.response.start", "websocket.http.response.body")
    assert (start["status"], dict(start["headers"])[b"upgrade"]) == (426, b"HTTP/1.1")
    assert "/v1/responses" in json.loads(body["body"])["error"]["message"]


def test_lifespan_passes() -> None:
    """VLLM's own start and end use it."""
    behind = Behind()
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(Guard(behind)({"type": "lifespan"}, None, send))  # type: ignore[arg-type]

    assert behind.scopes == [{"type": "lifespan"}]
    assert sent == [{"type": "lifespan.startup.complete"}]


@pytest.mark.parametrize("pipe", [None, SimpleNamespace(release={}), SimpleNamespace(release={"command": "release"})])
def test_guard_without_key_digests_serves_no_request(monkeypatch: pytest.MonkeyPatch, pipe: Any) -> None:
    """A release command without digests does not mean "no keys": the guard fails closed."""
    monkeypatch.setattr(parent_pipe, "current", lambda: pipe)
    behind = Behind()

    with pytest.raises(RuntimeError, match="carried no key digests"):
        ask(Guard(behind), "/v1/models", headers=bearer())
    assert behind.scopes == []


def test_guard_takes_the_keys_that_the_release_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM constructs the guard before the keys arrive; they are read at the first request."""
    pipe = SimpleNamespace(release={})
    monkeypatch.setattr(parent_pipe, "current", lambda: pipe)
    guard = Guard(Behind())
    pipe.release = {"command": "release", "digests": [DIGEST]}

    assert ask(guard, "/v1/models", headers=bearer()).status == 200
    assert ask(guard, "/v1/models", headers=bearer("x")).status == 401


def test_guard_compares_with_every_key_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first match does not end the comparison: the time does not reveal which key matched."""
    compared: list[str] = []

    def compare(given: str, known: str) -> bool:
        compared.append(known)
        return given == known

    monkeypatch.setattr("vllm_service.guard.hmac.compare_digest", compare)
    others = [hashlib.sha256(bytes([number])).hexdigest() for number in range(3)]

    assert ask(Guard(Behind(), [DIGEST, *others]), "/v1/models", headers=bearer()).status == 200
    assert compared == [DIGEST, *others]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"input":[0,1]}', "input"),
        (b'{"input":[{}]}', "input"),
        (b'{"input":"hi","tools":[1]}', "tools"),
        (b"a", None),
        ('{"input":[{}]}'.encode("utf-16"), None),
    ],
)
@pytest.mark.parametrize("cut", [0, 1])
def test_body_with_a_bad_list_is_refused_before_the_application(body: bytes, param: str | None, cut: int) -> None:
    """A 400 in OpenAI's shape names the field; vLLM gets nothing, however the body is split into chunks."""
    behind = Behind()
    answer = ask(Guard(behind, []), "/v1/responses", "POST", chunks=(body[:cut], body[cut:]))

    assert (answer.status, answer.error["code"], behind.scopes) == (400, "invalid_value", [])
    assert answer.error["param"] == param


def test_body_with_a_bad_list_is_refused_in_anthropics_shape_on_their_routes() -> None:
    """`type` is "error", as their clients expect it."""
    answer = json.loads(ask(Guard(Behind(), []), "/v1/messages", "POST", chunks=(b'{"messages":[{}]}',)).body)

    assert (answer["type"], answer["error"]["type"]) == ("error", "invalid_request_error")
    assert "messages[0]" in answer["error"]["message"]


@pytest.mark.parametrize("path", sorted(LISTS))
def test_body_that_the_client_breaks_off_never_reaches_the_application(path: str) -> None:
    """The client has left, and half a body is no request."""
    behind, sent = Behind(), []
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Guard(behind, [])({"type": "http", "path": path, "method": "POST", "headers": []}, receive, send))
    assert (behind.scopes, sent) == ([], [])


def test_options_with_a_body_is_not_collected() -> None:
    """It needs no key, so its body must not be read."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(dict(message))

    scope = {"type": "http", "path": "/v1/responses", "method": "OPTIONS", "headers": []}
    asyncio.run(Guard(Behind(), [DIGEST])(scope, None, send))  # type: ignore[arg-type]

    assert sent[0]["status"] == 204
