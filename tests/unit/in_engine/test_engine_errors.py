"""The engine's errors as errors of this API. The sentences are vLLM 0.32's; tests/engine asks an engine for them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from vllm_service import engine_errors
from vllm_service.api_error import APIError
from vllm_service.engine_errors import engine_lost, from_answer, from_event, from_exception

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
TOKENS = (
    "This model's maximum context length is 2048 tokens. However, your prompt contains at least 2049 input tokens, "
    "which exceeds this limit even without any output tokens. Please reduce the length of the input prompt. "
    "(parameter=input_tokens, value=2049)"
)
CHARACTERS = (
    "This model's maximum context length is 2048 tokens. However, your prompt contains 50000 characters (more than "
    "40960 characters, which is the upper bound for 2048 input tokens). Please reduce the length of the input prompt."
)
OVERFLOWS = [
    (TOKENS, 2049),
    (TOKENS.replace("at least 2049", "3000"), 3000),
    (CHARACTERS, 2049),
    ("Input length (2100) exceeds model's maximum context length (2048).", 2100),
    ("The engine prompt length 2048 exceeds the max_model_len 2048. Please reduce prompt.", 2049),
    ("The decoder prompt (length 2500) is longer than the maximum model length of 2048. Make sure that …", 2500),
    (
        "The decoder prompt (length 2048) plus the number of requested output tokens (at least 1) is longer than the "
        "maximum model length of 2048. Make sure that `max_model_len` is no smaller than the number of text tokens.",
        2049,
    ),
]
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


def body(message: str, code: int = 400, kind: str = "BadRequestError", param: str | None = None) -> bytes:
    """Return the body of one of vLLM's errors."""
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


@pytest.mark.parametrize(("sentence", "tokens"), OVERFLOWS)
def test_overflow_is_the_code_and_the_words_that_agents_look_for(sentence: str, tokens: int) -> None:
    """Agents shorten the conversation on them; vLLM's sentence is kept."""
    error = from_answer(CHAT, 400, body(sentence))
    anthropic = from_answer(MESSAGES, 400, json.dumps({"type": "error", "error": {"message": sentence}}).encode())

    assert (error.status, error.code, error.names.openai) == (400, "context_length_exceeded", "invalid_request_error")
    assert error.message == sentence
    assert anthropic.message == f"prompt is too long: {tokens} tokens > 2048 maximum. {sentence}"
    assert anthropic.names.anthropic == "invalid_request_error"


@pytest.mark.parametrize(
    "sentence",
    [
        '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
        'tool_choice="required" requires --tool-call-parser to be set',
    ],
)
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_tools_of_a_model_without_a_parser_say_what_to_set(path: str, sentence: str) -> None:
    """The field of the entry, and not the flags of vLLM."""
    error = from_answer(path, 400, body(sentence))

    assert (error.status, error.code, error.param) == (400, "tools_not_supported", "tools")
    assert "Set tool_call_parser in its entry of the models file" in error.message


@pytest.mark.parametrize(("path", "param"), [(CHAT, "messages"), ("/v1/completions", "prompt"), (RESPONSES, "input")])
def test_overflow_names_the_field_with_the_prompt(path: str, param: str) -> None:
    """The name that vLLM gives is no field of the request."""
    assert from_answer(path, 400, body(TOKENS, param="input_tokens")).param == param


@pytest.mark.parametrize(
    ("status", "answer", "expected"),
    [
        (400, body("You must use one kind of …"), (400, "invalid_request", None)),
        (400, body("top_k must be at least 1, got -2."), (400, "invalid_value", "top_k")),
        (400, body("1 validation error", param="body.tools.0"), (400, "invalid_value", "tools.0")),
        (404, body("The model `x` does not exist.", 404, "NotFoundError", "model"), (404, "model_not_found", "model")),
        (404, body("Response with id 'a' not found.", 404), (404, "not_found", None)),
        (404, b'{"detail":"Not Found"}', (400, "unsupported_by_model", "model")),
        (405, b'{"detail":"Method Not Allowed"}', (405, "method_not_allowed", None)),
        (422, body("The image cannot be read.", 422, param="url"), (422, "invalid_value", "url")),
        (501, body("The model does not support Messages API", 501), (400, "not_supported", None)),
        (400, b"Bad Request", (400, "invalid_request", None)),
        (400, b"[1]", (400, "invalid_request", None)),
        (400, b"", (400, "invalid_request", None)),
        (500, body("'list' object has no attribute 'get'", 500), (502, "engine_error", None)),
        (500, b"<html>Internal Server Error</html>", (502, "engine_error", None)),
        (500, body(DEAD, 500), (502, "engine_lost", None)),
        (503, body("The engine is currently busy.", 503), (503, "engine_overloaded", None)),
    ],
)
def test_error_of_the_engine_becomes_one_of_the_api(
    status: int, answer: bytes, expected: tuple[int, str, str | None]
) -> None:
    """A word as code, a field as clients name it; its own failures are 502."""
    error = from_answer(CHAT, status, answer)

    assert (error.status, error.code, error.param) == expected
    assert error.message


def test_recording_that_is_too_long_is_told_without_vllms_variable() -> None:
    """Whoever sends it can set none."""
    sentence = "Audio exceeds maximum allowed duration of 600s (file contains 601.0s at 1000Hz)."
    advice = "Set VLLM_MAX_AUDIO_DECODE_DURATION_S to increase this limit."
    error = from_answer("/v1/audio/transcriptions", 400, body(f"{sentence} {advice}"))
    assert (error.status, error.code, error.param) == (400, "audio_too_long", "file")
    assert error.message == f"{sentence} Send it in shorter pieces."


def test_error_of_a_message_names_the_field_that_its_client_sent() -> None:
    """A message becomes a chat in vLLM, whose field has another name."""
    words = "max_completion_tokens=9 cannot be greater than max_model_len=8. (parameter=max_completion_tokens)"

    assert "max_completion_tokens" in from_answer(CHAT, 400, body(words)).message
    message = from_answer(MESSAGES, 400, body(words)).message
    assert message == "max_tokens=9 cannot be greater than max_model_len=8. (parameter=max_tokens)"


def test_failure_of_the_engine_tells_no_reason_and_is_not_repeated() -> None:
    """What broke inside is for the log; a dead engine and a full queue are worth a retry."""
    failed = from_answer(CHAT, 500, body("'list' object has no attribute 'get'", 500))
    lost, full = from_answer(CHAT, 500, body(DEAD, 500)), from_answer(CHAT, 503, body("busy", 503))

    assert "attribute" not in failed.message
    assert failed.headers == {"x-should-retry": "false"}
    assert lost.headers.keys() == full.headers.keys() == {"Retry-After"}
    assert "Send it again" in lost.message


@pytest.mark.parametrize(
    ("path", "status", "answer"),
    [
        (CHAT, 502, {"error": {"message": "a", "type": "server_error", "param": None, "code": "engine_lost"}}),
        (MESSAGES, 400, {"type": "error", "error": {"type": "x", "message": "prompt is too long"}, "request_id": "1"}),
    ],
)
def test_error_that_the_guard_reshaped_stays_as_it_is(path: str, status: int, answer: object) -> None:
    """The gateway reads the engine's errors by the same rule, after the guard."""
    error = from_answer(path, status, json.dumps(answer).encode())
    again = from_answer(path, error.status, error.body(path, "1"))

    assert (error.status, error.message) == (again.status, again.message)
    assert error.code == again.code
    assert path != CHAT or error.code == "engine_lost"


@pytest.mark.parametrize(
    ("path", "event", "expected"),
    [
        (CHAT, b"data: " + body("Internal server error", 500) + b"\n\n", (502, "engine_error")),
        (CHAT, b"data: " + body(DEAD, 500) + b"\n\n", (502, "engine_lost")),
        (CHAT, b"data: " + body(TOKENS) + b"\n\n", (400, "context_length_exceeded")),
        (
            MESSAGES,
            b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"a"}}\n\n',
            (502, "engine_error"),
        ),
        (MESSAGES, b"event: error\ndata: {", (502, "engine_error")),
        (CHAT, b'data: {"error": 1}\n\n', (502, "engine_error")),
    ],
)
def test_error_event_of_the_engine_becomes_one_of_the_api(path: str, event: bytes, expected: tuple[int, str]) -> None:
    """In a stream the status stands in the event's code, if at all."""
    error = from_event(path, event)

    assert (error.status, error.code) == expected


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
@pytest.mark.parametrize("error", [engine_lost(), from_answer(CHAT, 400, body(TOKENS)), from_answer(CHAT, 503, b"x")])
def test_last_event_of_a_stream_is_the_error_that_ended_it(path: str, error: APIError) -> None:
    """For the gateway's log: status, and the code where the protocol has one."""
    stream = b'data: {"content":"data: {\\"error\\": {"}\n\n' * 80

    assert engine_errors.last_event(path, stream[-2048:]) is None
    found = engine_errors.last_event(path, (stream + error.event(path, "1"))[-2048:])
    assert found
    assert (found.status, found.message) == (error.status, error.message)
    assert path == MESSAGES or found.code == error.code


def test_any_failure_after_the_cores_death_is_a_lost_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """On `/v1/messages` and `/v1/responses` vLLM replaces the words that say so."""
    anthropic = b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"1 validation"}}\n\n'
    monkeypatch.setattr(engine_errors, "_engine", SimpleNamespace(errored=True))

    assert from_event(MESSAGES, anthropic).code == "engine_lost"
    assert from_exception(CHAT, ValueError("any")).code == "engine_lost"
    assert from_answer(CHAT, 500, b"").code == "engine_lost"
    assert from_answer(CHAT, 400, body("No.")).code == "invalid_request"


def test_exception_of_the_engine_is_an_error_of_the_engine() -> None:
    """With the words of a dead core it is a lost engine."""
    assert from_exception(CHAT, KeyError("x")).code == "engine_error"
    assert from_exception(CHAT, RuntimeError(DEAD)).code == "engine_lost"


class VLLMClientError(Exception):
    """As vLLM's."""

    parameter = "top_k"


@pytest.mark.parametrize(
    ("exception", "code"),
    [
        (VLLMClientError("top_k is wrong."), "invalid_value"),
        (ValueError("The choice is empty."), "invalid_request"),
        (OverflowError("Too large."), "invalid_request"),
        (ValueError(TOKENS), "context_length_exceeded"),
    ],
)
def test_exception_about_a_value_of_the_client_is_400(exception: Exception, code: str) -> None:
    """By vLLM's own rule; it raises them where a stream has begun."""
    wrapped = RuntimeError("Caught handled exception, but response already started.")
    wrapped.__cause__ = exception

    for raised in (exception, wrapped):
        error = from_exception(CHAT, raised)
        assert (error.status, error.code, error.message) == (400, code, str(exception))
