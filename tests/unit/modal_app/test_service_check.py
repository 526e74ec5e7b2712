"""The test of a service from outside, against answers that are right and wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from service.cli import service_test
from service.errors import ServiceError, UsageError
from service.modal_app import service_check
from service.modal_app.selftest import CHARACTERS
from service.settings import Settings

NAMES = ["health", "models", "wake", "chat", "stream", "JSON schema", "choice", "tool", "pirate", "Jar Jar"]
ENTRY = {
    **{"id": "llm", "display_name": "tiny", "gpu": "L4", "dollars_per_hour": 0.8},
    **{"state": "cold", "reason": None, "max_model_len": 2048},
}
RIGHT: dict[str, Any] = {
    "GET /health": {"status": "ok"},
    "GET /v1/models": {"data": [ENTRY, ENTRY]},
    "GET /v1/models/tiny": ENTRY,
    "GET /v1/models/llm": ENTRY,
    "chat": {"content": "Paris."},
    "stream": "Paris.",
    "schema": {"content": '{"name": "John", "age": 30}'},
    "choice": {"content": "Positive"},
    "tool": {"tool_calls": [{"function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}]},
}


class Answers(ThreadingHTTPServer):
    """A service with these answers; an integer is a status."""

    def __init__(self, answers: dict[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = answers
        self.bodies: list[Any] = []

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Answers as `Answers` says."""

    server: Answers

    def do_GET(self) -> None:
        """Answer what needs no body."""
        self._send(self.server.answers.get(f"GET {self.path}", 404))

    def do_POST(self) -> None:
        """Answer a chat request."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if body.get("stream"):
            self._send(self._events(self.server.answers["stream"]))
            return
        kinds = {"response_format": "schema", "structured_outputs": "choice", "tools": "tool"}
        kind = next((kind for field, kind in kinds.items() if field in body), "chat")
        message = self.server.answers[kind]
        choices = [{"message": message}]
        self._send(message if isinstance(message, int) else {"choices": choices, "usage": {"completion_tokens": 7}})

    def _events(self, text: Any) -> Any:
        if isinstance(text, int):
            return text
        chunks = [{"choices": [{"delta": {"content": text}}]}, {"choices": [], "usage": {"completion_tokens": 7}}]
        return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"

    def _send(self, answer: Any) -> None:
        status, text = (answer, '{"error": {"message": "Not so."}}') if isinstance(answer, int) else (200, answer)
        data = (text if isinstance(text, str) else json.dumps(text)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def service() -> Iterator[Answers]:
    """A service whose answers are right."""
    with Answers(dict(RIGHT)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(service: Answers) -> list[service_check.Check]:
    """Run all checks."""
    return list(service_check.run(service_check.Service(service.url, "sk-secret", "tiny", 5), lambda _: None))


def test_service_that_is_right_passes_all_checks(service: Answers, capsys: pytest.CaptureFixture[str]) -> None:
    """A line each, the wake told on stderr; both characters are asked for."""
    service_test.run(service_test.service_at(f"{service.url}/v1", "", "tiny", None, Settings()), as_json=False)
    printed = capsys.readouterr()
    assert [line[:12].strip() for line in printed.out.splitlines()] == NAMES
    assert {line[12:19] for line in printed.out.splitlines()} == {"ok     "}
    assert max(map(len, printed.out.splitlines())) <= 80
    assert printed.err == "Waking tiny on L4, which costs $0.80/h while it is up\n"
    assert [body["messages"][0]["content"] for body in service.bodies[-2:]] == list(CHARACTERS)
    assert max(body["max_tokens"] for body in service.bodies) == 512


@pytest.mark.parametrize(
    ("answers", "name", "error"),
    [
        ({"chat": 500}, "chat", "/v1/chat/completions answered 500: Not so."),
        ({"chat": {"content": " "}}, "chat", "Model 'tiny' answered, but with an empty message."),
        ({"schema": {"content": "John"}}, "JSON schema", "with 'John', which the schema does not allow."),
        ({"schema": {"content": '{"name": "John"}'}}, "JSON schema", "which the schema does not allow."),
        ({"choice": {"content": "Great"}}, "choice", "with 'Great', which is none of Positive, Negative, Neutral."),
        ({"tool": {"content": "Sunny."}}, "tool", "in place of a call of get_weather with a city."),
        ({"tool": {"tool_calls": [7]}}, "tool", "not in the shape of OpenAI's API: TypeError("),
    ],
)
def test_check_that_fails_says_why_and_the_others_go_on(
    service: Answers, answers: dict[str, Any], name: str, error: str
) -> None:
    """The error has the reason, its hint the next step; no check is left out."""
    service.answers.update(answers)
    checks = run(service)
    assert [check.name for check in checks] == NAMES
    ((failed, found),) = [(check.name, check.error) for check in checks if check.error]
    assert failed == name
    assert error in found.message
    assert "vllm-service logs" in found.hint


@pytest.mark.parametrize(
    ("answers", "last", "error"),
    [
        ({"GET /health": 502}, "health", "/health answered 502: Not so."),
        ({"GET /v1/models": 401}, "models", "/v1/models answered 401: Not so."),
        ({"GET /v1/models/tiny": 404}, "models", "/v1/models/tiny answered 404: Not so."),
        ({"GET /v1/models/tiny": {}}, "models", "it tells no state of the model."),
        (
            {"GET /v1/models/tiny": {**ENTRY, "state": "does_not_fit", "reason": "It is too large."}},
            "wake",
            "too large",
        ),
        ({"stream": 503}, "wake", "/v1/chat/completions answered 503: Not so."),
    ],
)
def test_checks_that_could_not_go_well_are_left_out(
    service: Answers, answers: dict[str, Any], last: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line is what failed; the command's error has no key, and its exit code is 1."""
    service.answers.update(answers)
    with pytest.raises(ServiceError) as refused:
        service_test.run(service_test.service_at(service.url, "sk-secret", "tiny", None, Settings()), as_json=True)
    assert refused.value.exit_code == 1
    outcome = json.loads(capsys.readouterr().out)
    assert (outcome["passed"], outcome["checks"][-1]["check"]) == (False, last)
    assert error in outcome["checks"][-1]["error"]
    assert "sk-secret" not in f"{refused.value}{outcome}"


def test_name_of_a_model_on_a_gpu_is_the_one_that_requests_have(service: Answers) -> None:
    """Without a model it is the service's default, which the service tells; a count is refused."""
    at = service_test.service_at
    assert at(service.url, "", None, None, Settings()).model == "llm"
    assert at(service.url, "", "qwen3-8b", "h200", Settings()).model == "qwen3-8b-h200"
    assert at(service.url, "", None, "H200", Settings()).model == "tiny-h200"
    with pytest.raises(UsageError, match="have no number of GPUs"):
        at(service.url, "", "tiny", "H200:2", Settings())
