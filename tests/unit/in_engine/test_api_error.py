"""The errors of the API: the names of each status, the shape of each protocol, and when a client may retry."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from vllm_service.api_error import ERROR_NAMES, APIError

ID = "request-1"
OPENAI = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/v1/models", "/nowhere")
ANTHROPIC = ("/v1/messages", "/v1/messages/count_tokens")
# Source: the error types of Anthropic's client, version 2.11; docs.claude.com/en/api/errors has the statuses.
ANTHROPICS_TYPES = {
    "invalid_request_error", "authentication_error", "billing_error", "permission_error", "not_found_error",
    "rate_limit_error", "timeout_error", "overloaded_error", "api_error", "request_too_large",
}  # fmt: skip
OPENAIS_TYPES = {
    "invalid_request_error", "authentication_error", "permission_error", "not_found_error", "rate_limit_error",
    "server_error",
}  # fmt: skip


def error(status: int = 502, **fields: Any) -> APIError:
    """Return an error with a message."""
    return APIError(status, "No.", **fields)


def events(text: bytes) -> list[tuple[str, Any]]:
    """Return the events of a stream: name and data."""
    found = []
    for event in text.removesuffix(b"\n\n").decode().split("\n\n"):
        name, _, data = event.rpartition("data: ")
        found.append((name.removeprefix("event: ").strip(), data if data == "[DONE]" else json.loads(data)))
    return found


def sent(status: int, path: str, **fields: Any) -> tuple[int, dict[str, str], bytes]:
    """Send an error, and return status, headers and body."""
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    asyncio.run(error(status, **fields).send(path, ID, send))
    start, body = messages
    return start["status"], {name.decode(): value.decode() for name, value in start["headers"]}, body["body"]


@pytest.mark.parametrize("status", ERROR_NAMES)
def test_error_names_are_those_of_the_protocols_and_the_code_is_a_word(status: int) -> None:
    """A client can compare each of them."""
    names = ERROR_NAMES[status]

    assert names.openai in OPENAIS_TYPES
    assert names.anthropic in ANTHROPICS_TYPES
    assert re.fullmatch("[a-z_]+", names.code)


@pytest.mark.parametrize(("status", "like"), [(418, 400), (422, 400), (507, 500)])
def test_error_of_a_status_that_is_not_in_the_table_is_named_by_its_class(status: int, like: int) -> None:
    """Whatever the engine answers has a type and a code."""
    assert error(status).names == ERROR_NAMES[like]


@pytest.mark.parametrize("path", OPENAI)
def test_error_body_of_openais_routes_has_openais_shape(path: str) -> None:
    """Message, type, field and a word as code; nothing beside `error`."""
    expected = {"message": "No.", "type": "invalid_request_error", "param": "n", "code": "invalid_value"}

    assert json.loads(error(400, code="invalid_value", param="n").body(path, ID)) == {"error": expected}


@pytest.mark.parametrize("path", ANTHROPIC)
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (502, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
    ],
)
def test_error_body_of_anthropics_routes_has_anthropics_shape(path: str, status: int, kind: str) -> None:
    """Type by status, and the request's id."""
    expected = {"type": "error", "error": {"type": kind, "message": "No."}, "request_id": ID}

    assert json.loads(error(status, code="any", param="any").body(path, ID)) == expected


def test_error_event_of_openais_streams_has_the_status_and_done() -> None:
    """The status that the answer would have had: the headers were sent with 200."""
    ((_, data), (_, done)) = events(error(code="engine_lost").event("/v1/chat/completions", ID))

    assert data == {
        "error": {"message": "No.", "type": "server_error", "param": None, "code": "engine_lost", "status": 502}
    }
    assert done == "[DONE]"


def test_error_events_of_the_responses_api_are_openais_two() -> None:
    """`error`, whose nested fields OpenAI's clients raise, and `response.failed`, which Codex reads."""
    (name, data), (last, failed) = events(error(400, code="context_length_exceeded").event("/v1/responses", ID))

    assert (name, last) == ("error", "response.failed") == (data["type"], failed["type"])
    assert (data["code"], data["message"], data["param"]) == ("context_length_exceeded", "No.", None)
    assert data["error"]["type"] == "invalid_request_error"
    assert data["error"]["status"] == 400
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "context_length_exceeded", "message": "No."}
    assert data["sequence_number"] < failed["sequence_number"]


def test_error_event_of_anthropics_streams_is_the_body() -> None:
    """One event, named `error`."""
    ((name, data),) = events(error(503).event("/v1/messages", ID))

    assert name == "error"
    assert data == json.loads(error(503).body("/v1/messages", ID))


@pytest.mark.parametrize("path", [*OPENAI, *ANTHROPIC])
def test_error_answer_tells_the_requests_id(path: str) -> None:
    """Anthropic's clients read `request-id`."""
    status, headers, body = sent(404, path)

    assert (status, headers["content-type"]) == (404, "application/json")
    assert int(headers["content-length"]) == len(body)
    assert headers["x-request-id"] == ID
    assert headers.get("request-id") == (ID if path in ANTHROPIC else None)


@pytest.mark.parametrize("status", [401, 409, 429, 500, 502, 503, 504])
def test_error_that_clients_repeat_by_themselves_says_when_or_that_it_is_lasting(status: int) -> None:
    """OpenAI's and Anthropic's clients repeat these, Claude Code 401 too; what no retry mends they must not repeat."""
    _, lasting, _ = sent(status, "/v1/messages")
    _, transient, _ = sent(status, "/v1/messages", retry_after_s=0.2)

    assert (lasting.get("retry-after"), lasting["x-should-retry"]) == (None, "false")
    assert (transient["retry-after"], transient.get("x-should-retry")) == ("1", None)


@pytest.mark.parametrize("status", [400, 403, 404, 405, 408, 413, 415, 422])
def test_error_of_the_clients_own_has_neither_header(status: int) -> None:
    """No client repeats these, except after 408, where the next attempt may be faster."""
    _, headers, _ = sent(status, "/v1/messages")

    assert headers.keys() & {"retry-after", "x-should-retry"} == set()
