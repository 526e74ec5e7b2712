"""The drain: which requests are refused, which may finish, and with which error the others end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from vllm_service import answer as guards
from vllm_service.api_error import Message
from vllm_service.drain import RETRY_AFTER_S, TEXT, Drain
from vllm_service.guard import Guard

from tests.unit.in_engine.test_guard import DIGEST, ROUTES, Answer, Behind, ask, bearer

CHAT = "/v1/chat/completions"
SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]
JSON = [(b"content-type", b"application/json")]
LONG_S = 30.0  # a grace that no test here waits out
CANCEL_S = 1.0


class Client:
    """One request in flight, and the application behind the guard that answers it when it is told to."""

    def __init__(self, drain_: Drain, path: str = CHAT) -> None:
        self.sent: list[Message] = []
        self.arrived, self.go_on = asyncio.Event(), asyncio.Event()
        self._first: list[Message] = []
        self.ended: list[BaseException | None] = []
        scope = {"type": "http", "path": path, "method": "POST", "headers": []}
        self._guard, self._scope = Guard(self._answer, [], drain_), scope

    async def _receive(self) -> Message:
        return {"type": "http.request", "body": b"{}"}

    async def _send(self, message: Message) -> None:
        self.sent.append(dict(message))

    async def _answer(self, _scope: Message, _: Any, send: Any) -> None:
        for message in self._first:
            await send(message)
        self.arrived.set()
        try:
            await self.go_on.wait()
        except BaseException as error:
            self.ended.append(error)
            raise
        await send({"type": "http.response.body", "body": b"end"})

    async def begin(self, headers: list[tuple[bytes, bytes]] | None = None, *pieces: bytes) -> asyncio.Task[None]:
        """Send the request, and return its task once the application has answered with a start and these pieces."""
        if headers is not None:
            self._first = [{"type": "http.response.start", "status": 200, "headers": headers}]
            self._first += [{"type": "http.response.body", "body": piece, "more_body": True} for piece in pieces]
        task: asyncio.Task[None] = asyncio.create_task(self._guard(self._scope, self._receive, self._send))
        await self.arrived.wait()
        return task

    @property
    def body(self) -> bytes:
        """What the client has got so far."""
        return b"".join(message.get("body", b"") for message in self.sent)


def run(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Play a scene in an event loop of its own, and insist that it ends."""
    asyncio.run(asyncio.wait_for(scene(), 20))


def drained() -> Drain:
    """Return a drain that has begun, with nothing in flight."""
    ended = Drain()
    assert asyncio.run(ended.drain(0, CANCEL_S)) == 0
    return ended


@pytest.mark.parametrize(("path", "method"), ROUTES)
def test_drain_refuses_a_new_request_and_says_when_to_ask_again(path: str, method: str) -> None:
    """Also /health, so that a load balancer chooses another replica."""
    behind = Behind()
    answer = ask(Guard(behind, [DIGEST], drained()), path, method, bearer())

    assert (answer.status, answer.error["message"]) == (503, TEXT)
    assert answer.error.get("code", "shutting_down") == "shutting_down"
    assert answer.headers[b"retry-after"] == str(RETRY_AFTER_S).encode()
    assert behind.scopes == []


@pytest.mark.parametrize(("path", "status"), [(CHAT, 401), ("/v1/models", 401), ("/load", 404), ("/", 404)])
def test_drain_does_not_answer_a_request_without_key_or_route(path: str, status: int) -> None:
    """Key and route are checked first: a retry would not help such a request."""
    method = "POST" if path == CHAT else "GET"

    assert ask(Guard(Behind(), [DIGEST], drained()), path, method).status == status


def test_drain_with_nothing_in_flight_is_over_at_once() -> None:
    """Without a request there is nothing to wait for."""

    async def scene() -> None:
        ended = Drain()
        assert await ended.drain(LONG_S, CANCEL_S) == 0
        assert ended.begun

    run(scene)


@pytest.mark.parametrize("headers", [SSE, JSON])
def test_drain_lets_a_request_finish_within_the_grace(headers: list[tuple[bytes, bytes]]) -> None:
    """It gets its whole answer, and the drain ends with the last request."""

    async def scene() -> None:
        ended = Drain()
        client = Client(ended)
        task = await client.begin(headers, b"one ")
        over = asyncio.ensure_future(ended.drain(LONG_S, CANCEL_S))
        await asyncio.sleep(0)
        assert ended.begun
        client.go_on.set()

        assert await over == 0
        await task
        assert client.body == b"one end"

    run(scene)


def openai(sent: bytes) -> None:
    """Check the last events of a stream as OpenAI's client reads them."""
    error, done, rest = sent.split(b"\n\n")
    fields = json.loads(error.removeprefix(b"data: "))["error"]
    assert (fields["code"], fields["type"], fields["status"]) == ("shutting_down", "server_error", 503)
    assert (done, rest) == (b"data: [DONE]", b"")


def anthropic(sent: bytes) -> None:
    """Check the last event of a stream as Anthropic's client reads it."""
    name, data = sent.removesuffix(b"\n\n").split(b"\n")
    assert name == b"event: error"
    event = json.loads(data.removeprefix(b"data: "))
    assert event.pop("request_id")
    assert event == {"type": "error", "error": {"type": "overloaded_error", "message": TEXT}}


def responses(sent: bytes) -> None:
    """Check the last events of a stream of the Responses API."""
    error, failed = (event.split(b"\n") for event in sent.removesuffix(b"\n\n").split(b"\n\n"))
    assert (error[0], failed[0]) == (b"event: error", b"event: response.failed")
    event = json.loads(error[1].removeprefix(b"data: "))
    assert (event["type"], event["code"], event["message"]) == ("error", "shutting_down", TEXT)
    response = json.loads(failed[1].removeprefix(b"data: "))["response"]
    assert (response["status"], response["error"]) == ("failed", {"code": "shutting_down", "message": TEXT})


@pytest.mark.parametrize(
    ("path", "check"),
    [(CHAT, openai), ("/v1/completions", openai), ("/v1/messages", anthropic), ("/v1/responses", responses)],
)
def test_drain_ends_a_stream_with_an_error_event_of_its_protocol(path: str, check: Callable[[bytes], None]) -> None:
    """The client learns why the stream ended and that it should retry; the response is complete."""

    async def scene() -> None:
        ended = Drain()
        client = Client(ended, path)
        task = await client.begin(SSE, b"data: {}\n\n")

        assert await ended.drain(0, CANCEL_S) == 1
        await task
        assert Answer(client.sent).status == 200
        check(client.body.removeprefix(b"data: {}\n\n"))
        assert isinstance(client.ended[0], asyncio.CancelledError)  # the engine generates no more for it
        assert task.cancelling() == 0  # the server goes on with the task

    run(scene)


def test_drain_refuses_a_request_whose_answer_has_not_begun() -> None:
    """Nothing was sent yet, so it gets a whole error answer."""

    async def scene() -> None:
        ended = Drain()
        client = Client(ended)
        task = await client.begin()

        assert await ended.drain(0, CANCEL_S) == 1
        await task
        answer = Answer(client.sent)
        assert (answer.status, answer.error["code"]) == (503, "shutting_down")
        assert answer.headers[b"retry-after"] == str(RETRY_AFTER_S).encode()

    run(scene)


def test_drain_leaves_a_json_answer_without_an_end() -> None:
    """Half a document with an end would look complete; without one the server closes the connection."""

    async def scene() -> None:
        ended = Drain()
        client = Client(ended)
        task = await client.begin(JSON, b'{"half":')

        assert await ended.drain(0, CANCEL_S) == 1
        await task
        assert client.body == b'{"half":'
        assert client.sent[-1]["more_body"] is True

    run(scene)


def test_drain_adds_nothing_to_an_answer_that_is_over() -> None:
    """An application may go on after its answer, which the client has."""

    async def scene() -> None:
        ended = Drain()
        sent: list[Message] = []
        working = asyncio.Event()

        async def send(message: Message) -> None:
            sent.append(message)

        answer = guards.Answer({"path": CHAT, "headers": []}, send)

        async def app() -> None:
            await answer.send({"type": "http.response.start", "status": 200, "headers": SSE})
            await answer.send({"type": "http.response.body", "body": b"all"})
            working.set()
            await asyncio.Event().wait()

        task = asyncio.ensure_future(ended.run(answer, app))
        await working.wait()

        assert await ended.drain(0, CANCEL_S) == 1
        await task
        assert [message.get("body") for message in sent] == [None, b"all"]

    run(scene)
