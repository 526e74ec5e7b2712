"""The self-test of `modal run` against a fake service; and one request to an engine over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from service.errors import ServiceError
from service.modal_app import engine_client, selftest

Capture = pytest.CaptureFixture[str]


class Service:
    """A fake `Server.complete` with two paths; it fails for any other."""

    def __init__(self, health: Any = (200, {"status": "ok"}), chat: Any = None) -> None:
        self.health = health
        self.chat = chat or (200, {"choices": [{"message": {"content": "Arr!", "reasoning": None}}]})
        self.bodies: list[Any] = []

    def __call__(self, path: str, body: Any) -> tuple[int, Any]:
        """Answer one request."""
        if (path, body) == ("/health", None):
            return self.health  # type: ignore[no-any-return]
        assert path == "/v1/chat/completions", f"the fake service does not know {path}"
        self.bodies.append(body)
        return self.chat  # type: ignore[no-any-return]


@pytest.mark.parametrize(("twice", "conversations"), [(True, 2), (False, 1)])
def test_selftest_holds_its_conversations(capsys: Capture, twice: bool, conversations: int) -> None:
    """Health first; then each character once, with the caller's question."""
    service = Service()
    selftest.run(service, None, "What is SVD?", twice)

    assert len(service.bodies) == conversations
    assert all(body["model"] == "llm" for body in service.bodies)
    systems = [body["messages"][0]["content"] for body in service.bodies]
    assert systems == list(selftest.CHARACTERS[:conversations])
    assert all(body["messages"][1] == {"role": "user", "content": "What is SVD?"} for body in service.bodies)
    out = capsys.readouterr().out
    assert out.index("Healthy") < out.index("Arr!")
    assert out.count("Arr!") == conversations


@pytest.mark.parametrize("health", [(503, None), (200, "ok"), (200, {"status": "no"}), (404, {"error": {}})])
def test_selftest_of_an_unhealthy_service_fails_with_its_answer(health: Any) -> None:
    """No conversation follows."""
    service = Service(health=health)
    with pytest.raises(ServiceError, match=f"/health answered {health[0]}"):
        selftest.run(service, None, "x", True)

    assert service.bodies == []


def test_selftest_of_a_refused_chat_fails_with_its_answer() -> None:
    """Status and answer are in the error."""
    with pytest.raises(ServiceError, match=r"answered 500: .*boom"):
        selftest.run(Service(chat=(500, {"error": "boom"})), None, "x", True)


@pytest.mark.parametrize("message", [{"content": ""}, {"content": None, "reasoning": None}, {"content": "  \n"}])
def test_selftest_of_an_empty_answer_fails(message: dict[str, Any]) -> None:
    """An engine that generates no text does not work."""
    with pytest.raises(ServiceError, match="answer is empty"):
        selftest.run(Service(chat=(200, {"choices": [{"message": message}]})), None, "x", True)


def test_selftest_counts_reasoning_as_an_answer(capsys: Capture) -> None:
    """A thinking model may use all its tokens before the answer."""
    selftest.run(
        Service(chat=(200, {"choices": [{"message": {"reasoning": "Hm", "content": None}}]})), None, "x", False
    )

    assert "Hm" in capsys.readouterr().out


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[Any]]]:
    """Run a web endpoint that streams two words and echoes other requests; return its address and what it was sent."""
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Write nothing."""

        def do_GET(self) -> None:
            """Answer with what came."""
            length = int(self.headers.get("Content-Length", 0))
            seen.append((self.command, self.path, dict(self.headers), self.rfile.read(length)))
            bodies = {
                "/v1/chat/completions": b'data: {"choices":[{"delta":{"content":"Arr"}}]}\n\n: ping\n\n'
                b'data: {"choices":[{"delta":{"content":"!"}}]}\n\ndata: {"choices":[]}\n\ndata: [DONE]\n\n',
                "/json": b'{"a": 1}',
            }
            body = bodies.get(self.path, b"plain")
            self.send_response(200 if self.path in bodies else 418)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - the base class's name

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()
    thread.join()


def test_selftest_with_a_proxy_token_streams_over_the_web(
    web: tuple[str, list[Any]], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The answer is streamed from the public URL, with the token in Modal's headers and nowhere in the output."""
    monkeypatch.setenv("MODAL_KEY", "wk-t0p")
    monkeypatch.setenv("MODAL_SECRET", "ws-t0p")
    with pytest.raises(ServiceError, match="418"):  # the pool of another model is in the query
        selftest.run(Service(), web[0], "x", False, model="qwen3-8b")
    assert web[1].pop()[1] == "/v1/chat/completions?model=qwen3-8b"
    selftest.run(Service(), web[0], "x", False)

    method, path, headers, body = web[1][0]
    assert (method, path, headers["Modal-Key"], headers["Modal-Secret"]) == (
        *("POST", "/v1/chat/completions", "wk-t0p", "ws-t0p"),
    )
    assert json.loads(body)["stream"] is True
    out = capsys.readouterr().out
    assert "Arr!" in out
    assert "t0p" not in out


def test_selftest_over_the_web_fails_with_its_answer(
    web: tuple[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status and text are in the error."""
    monkeypatch.setenv("MODAL_KEY", "k")
    monkeypatch.setenv("MODAL_SECRET", "s")

    with pytest.raises(ServiceError, match="418: plain"):
        selftest.run(Service(), f"{web[0]}/elsewhere", "x", False)


@pytest.mark.parametrize(
    ("path", "body", "method", "answer"),
    [
        ("/json", None, "GET", (200, {"a": 1})),
        ("json", {"q": 1}, "POST", (200, {"a": 1})),
        ("/x", {}, "POST", (418, "plain")),
    ],
)
def test_request_to_the_engine_returns_status_and_answer(
    web: tuple[str, list[Any]], path: str, body: Any, method: str, answer: tuple[int, Any]
) -> None:
    """JSON is parsed, anything else is text; the key goes into the header."""
    port = int(web[0].rpartition(":")[2])

    assert asyncio.run(engine_client.request(port, path, body, "own-key")) == answer
    assert web[1][0][0] == method
    assert web[1][0][2]["Authorization"] == "Bearer own-key"


def test_request_to_the_engine_without_a_key_sends_none(web: tuple[str, list[Any]]) -> None:
    """No header, rather than an empty one."""
    asyncio.run(engine_client.request(int(web[0].rpartition(":")[2]), "/json", None))

    assert "Authorization" not in web[1][0][2]
