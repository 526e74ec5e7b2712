"""What a deploy says of a gateway that answers otherwise than a gateway does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from service.errors import ServiceError
from service.modal_app import gateway_check


@contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    """A server that answers everything so; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET  # noqa: N815 - the name that the server looks up

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def events(*deltas: dict[str, str]) -> str:
    """Return a stream of a chat."""
    lines = [f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n" for delta in deltas]
    return ": a comment\n\n" + "".join(lines) + "data: [DONE]\n\n"


def test_models_and_chat_are_read_from_what_a_gateway_answers() -> None:
    """The list of models, and the text of a stream with comments, thoughts and a role."""
    with answering(200, '{"data": [{"id": "llm"}]}') as url:
        assert gateway_check.models(url, "k") == [{"id": "llm"}]
        gateway_check.health(url)
    with answering(200, events({"role": "assistant"}, {"reasoning": "Hm. "}, {"content": "Paris"})) as url:
        assert gateway_check.chat(url, "k", "llm", 5) == "Hm. Paris"


def test_key_that_no_header_can_have_is_not_repeated() -> None:
    """A line break at its end is what a file or a copy leaves."""
    with answering(200, "{}") as url, pytest.raises(ServiceError) as refused:
        gateway_check.models(url, "sk-secret\n")
    assert "sk-secret" not in str(refused.value)


Ask = Callable[[str], Any]
MODELS: Ask = lambda url: gateway_check.models(url, "sk-secret")  # noqa: E731 - a row of the table
CHAT: Ask = lambda url: gateway_check.chat(url, "sk-secret", "tiny", 5)  # noqa: E731


@pytest.mark.parametrize(
    ("ask", "status", "body", "message", "hint"),
    [
        (MODELS, 401, "no key", "/v1/models answered 401: no key.", "VLLM_API_KEY has none of the keys"),
        (MODELS, 503, '{"error": {"message": "Not now."}}', "/v1/models answered 503: Not now.", "Read its log: "),
        (MODELS, 500, "x", "/v1/models answered 500: x.", "Read its log: vllm-service logs;"),
        (MODELS, 200, "<html>", "/v1/models did not answer as a gateway does: ", "Start the service"),
        (MODELS, 200, "{}", "/v1/models did not answer as a gateway does: ", "Start the service"),
        (CHAT, 200, events({"content": " "}), "'tiny' gave an empty answer.", "Read its log: "),
        (
            *(CHAT, 200, 'data: {"error": {"message": "It ran out of memory."}}\n\n'),
            *("/v1/chat/completions answered 200: It ran out of memory.", "Read its log: "),
        ),
    ],
)
def test_answer_that_is_no_gateways_is_one_sentence(ask: Ask, status: int, body: str, message: str, hint: str) -> None:
    """With the next step, and without the key."""
    with answering(status, body) as url, pytest.raises(ServiceError) as refused:
        ask(url)
    assert message in refused.value.message
    assert refused.value.hint.startswith(hint)
    assert "sk-secret" not in str(refused.value)
