"""vLLM's answers on their way through the guard: errors are reshaped, everything else passes as it is."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from vllm_service import answer
from vllm_service.api_error import Message
from vllm_service.drain import Drain
from vllm_service.guard import Guard
from vllm_service.stream_comments import StreamComments, comment

from tests.unit.virtual_time import run_in_virtual_time

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]
ERROR = b'data: {"error": {"message": "No.", "type": "InternalServerError", "param": null, "code": 500}}\n\n'


def start(status: int = 200, headers: list[tuple[bytes, bytes]] | None = None) -> Message:
    """Return the start of an answer."""
    return {"type": "http.response.start", "status": status, "headers": headers or []}


def piece(body: bytes, more: bool = True) -> Message:
    """Return a piece of a body."""
    return {"type": "http.response.body", "body": body, "more_body": more}


def through(path: str, messages: Sequence[Message | float], raises: Exception | None = None) -> list[Message]:
    """Return what the client gets when an application sends these messages, with pauses, and raises then."""
    sent: list[Message] = []

    async def application(_scope: Any, _receive: Any, send: Any) -> None:
        for message in messages:
            await (asyncio.sleep(message) if isinstance(message, float) else send(message))
        if raises:
            raise raises

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Message) -> None:
        sent.append(dict(message))

    scope = {"type": "http", "path": path, "method": "POST", "headers": [(b"x-request-id", b"id-1")]}
    run_in_virtual_time(Guard(application, [], Drain())(scope, receive, send))
    return sent


def body_of(sent: list[Message]) -> bytes:
    """Return the whole body."""
    return b"".join(message.get("body", b"") for message in sent)


def test_answer_error_in_pieces_is_reshaped_once_it_is_whole() -> None:
    """Status and code are this API's; vLLM's headers go with its body."""
    error = json.dumps(
        {"error": {"message": "No.", "type": "BadRequestError", "param": "body.n", "code": 400}}
    ).encode()
    sent = through(CHAT, [start(400, [(b"content-length", b"1")]), piece(error[:9]), piece(error[9:], more=False)])

    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 400
    assert dict(sent[0]["headers"])[b"content-length"] == str(len(sent[1]["body"])).encode()
    expected = {"message": "No.", "type": "invalid_request_error", "param": "n", "code": "invalid_value"}
    assert json.loads(sent[1]["body"]) == {"error": expected}


def test_answer_error_without_end_is_read_in_part() -> None:
    """An answer of any length costs a bounded amount of memory."""
    sent = through(CHAT, [start(400), *[piece(b"x" * 65536)] * 64, piece(b"", more=False)])

    assert len(sent[1]["body"]) < 2000


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_answer_stream_with_an_error_event_ends_there(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """The event is reshaped, vLLM's own end after it is dropped, and the log has vLLM's words with the id."""
    event = b"event: error\n" + ERROR if path == MESSAGES else ERROR
    sent = through(
        path, [start(200, SSE), piece(b"data: {}\n\n"), piece(event), piece(b"data: [DONE]\n\n", more=False)]
    )

    assert sent[1]["body"] == b"data: {}\n\n"
    assert sent[-1].get("more_body", False) is False
    assert b"No." not in body_of(sent)
    assert body_of(sent).count(b"[DONE]") == (path == CHAT)
    assert caplog.messages == [f"request id-1 failed in vLLM: {event.decode()}"]


def test_answer_stream_may_tell_of_errors() -> None:
    """A model that writes the word, even at the beginning of a chunk of its text, changes nothing."""
    chunks = [
        b'data: {"choices":[{"delta":{"content":"{\\"error\\": 1}"}}]}\n\n',
        b"event: errors\n\n",
        b"data: [DONE]\n\n",
    ]
    sent = through(CHAT, [start(200, SSE), *(piece(chunk) for chunk in chunks), piece(b"", more=False)])

    assert [message["body"] for message in sent[1:-1]] == chunks


def test_answer_stream_tells_proxies_to_pass_each_event_at_once() -> None:
    """Without the first header nginx buffers, without the second a cache may keep the stream."""
    stream, other = through(CHAT, [start(200, SSE)]), through(CHAT, [start(200)])

    assert dict(stream[0]["headers"]).items() >= {b"x-accel-buffering": b"no", b"cache-control": b"no-cache"}.items()
    assert other[0]["headers"] == []


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_answer_stream_that_is_silent_gets_comments(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the direct path nobody else sends any; none comes after the end."""
    monkeypatch.setattr(answer, "StreamComments", functools.partial(StreamComments, interval_s=0.02))
    pause = 0.05
    sent = through(path, [start(200, SSE), pause, piece(b"data: {}\n\n"), pause, piece(b"", more=False), pause])

    text = comment(path, "waiting for the engine")
    assert {message["body"] for message in sent[1:-1]} == {text, b"data: {}\n\n"}
    assert sent[1]["body"] == sent[-2]["body"] == text
    assert sent[-1] == piece(b"", more=False)


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_answer_before_which_vllm_raises_is_502(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """Not vLLM's 500 with Python's words; the log has the traceback."""
    sent = through(path, [], KeyError("internal"))

    assert sent[0]["status"] == 502
    assert b"internal" not in sent[1]["body"]
    assert b"id-1" in sent[1]["body"] or path != MESSAGES
    assert caplog.records[0].exc_info


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_answer_stream_in_which_vllm_raises_ends_with_an_error_event(path: str) -> None:
    """On the Responses API it does when its core dies."""
    sent = through(path, [start(200, SSE), piece(b"data: {}\n\n")], RuntimeError("EngineCore encountered an issue"))

    assert b"Send it again" in body_of(sent)
    assert sent[-1].get("more_body", False) is False


def test_answer_that_breaks_off_in_the_middle_of_json_is_broken_off() -> None:
    """Half a document with an end would look complete."""
    with pytest.raises(KeyError):
        through(CHAT, [start(200), piece(b'{"half":')], KeyError("internal"))
