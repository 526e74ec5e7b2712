"""A cold pool: one wake for all waiting requests, in their order; what clients get meanwhile, and when it fails."""

from __future__ import annotations

import asyncio
import json
import re
from types import SimpleNamespace

import openai
import pytest

from service.gateway import pool as pool_module
from service.gateway.pool import Endpoint, WakeError
from service.in_engine.vllm_service.api_error import APIError
from tests.gateway.upstream import (
    ASK,
    SPECS,
    STREAMED,
    Engine,
    RunningGateway,
    TestPool,
    answers,
    eventually,
    refuses,
    serve_gateway,
    streams,
)

EVENT = b"data: {}\n\n"


def test_waking_hundred_clients_cause_one_wake_and_are_served_in_order() -> None:
    """All are held, all are answered, in the order in which they came."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway() as gateway:
            gateway.pools["tiny"] = gateway.app._inference._router.find("tiny").pool  # type: ignore[assignment]
            pool = gateway.pools["tiny"]
            pool.url = engine.url
            clients = []
            for number in range(100):
                clients.append(asyncio.ensure_future(_status(gateway, ASK | {"user": str(number)})))
                await eventually(lambda number=number: pool.in_use == number + 1)  # type: ignore[misc]
            assert engine.requests == []
            pool.may_wake.set()
            assert await asyncio.gather(*clients) == [200] * 100
            assert pool.wakes == 1
            order = [int(json.loads(request.body)["user"]) for request in engine.requests]
            assert order == sorted(order)

    asyncio.run(run())


async def _status(gateway: RunningGateway, body: object) -> int:
    async with gateway.post(body) as answer:
        await answer.read()
        return answer.status


def test_waking_stream_gets_comments_until_the_pool_is_ready() -> None:
    """Headers and comments first, then the engine's bytes."""

    async def run() -> None:
        async with Engine(streams(EVENT)).serving() as engine, serve_gateway(comment_interval_s=0.05) as gateway:
            pool = _pool(gateway, engine)
            async with gateway.post(STREAMED) as answer:
                assert answer.content_type == "text/event-stream"
                first = await answer.content.readuntil(b"\n\n")
                assert re.fullmatch(rb": waking tiny on H100, \d+ s, position 1 of 1\n\n", first)
                pool.may_wake.set()
                rest = await answer.content.read()
            comments = rb"(: (waking tiny on H100, \d+ s, position 1 of 1|waiting for tiny on H100, \d+ s)\n\n)*"
            assert re.fullmatch(comments + re.escape(EVENT) + comments, rest)

    asyncio.run(run())


def _pool(gateway: RunningGateway, engine: Engine | None = None):  # type: ignore[no-untyped-def]
    pool = gateway.app._inference._router.find("tiny").pool
    pool.url = engine.url if engine else ""  # type: ignore[attr-defined]
    return pool


def test_waking_request_held_too_long_is_503_with_retry_after() -> None:
    """The code is `model_waking`; the wake goes on for later requests."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(hold_s=0.1) as gateway:
            pool = _pool(gateway, engine)
            async with gateway.post(ASK) as answer:
                error = (await answer.json())["error"]
                assert (answer.status, error["code"]) == (503, "model_waking")
                assert 1 <= int(answer.headers["Retry-After"]) <= 60
            pool.may_wake.set()
            await eventually(lambda: pool.state == "ready")
            assert await _status(gateway, ASK) == 200
            assert pool.wakes == 1

    asyncio.run(run())


def test_waking_openai_client_retries_by_itself() -> None:
    """The official client obeys Retry-After, so its user sees no error."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(hold_s=0.1) as gateway:
            pool = _pool(gateway, engine)
            pool.wake_s = 0.5

            async def wake_once_refused() -> None:
                await eventually(lambda: bool(gateway.lines))
                pool.may_wake.set()

            waking = asyncio.ensure_future(wake_once_refused())
            async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=2) as client:
                await client.chat.completions.create(model="tiny", messages=[])
            await waking
            statuses = [json.loads(line)["status"] for line in gateway.lines]
            assert statuses == [503, 200]

    asyncio.run(run())


@pytest.mark.parametrize("body", [ASK, STREAMED])
def test_waking_that_fails_answers_all_waiting_requests_with_the_reason(body: object) -> None:
    """The reason comes as an answer, or inside a stream that has begun; an immediate retry causes no second boot."""

    async def one(gateway: RunningGateway) -> str:
        async with gateway.post(body) as answer:
            text = (await answer.read()).decode()
            assert answer.status == (503 if body is ASK else 200)
            return text

    async def run() -> None:
        async with serve_gateway(comment_interval_s=0.05) as gateway:
            pool = _pool(gateway)
            pool.fails = "CUDA out of memory."
            clients = [asyncio.ensure_future(one(gateway)) for _ in range(20)]
            await eventually(lambda: pool.in_use == 20)
            await asyncio.sleep(0.15)
            pool.may_wake.set()
            for text in await asyncio.gather(*clients):
                assert "CUDA out of memory." in text
                assert "model_failed" in text
            async with gateway.post(ASK) as answer:
                assert answer.status == 503
            assert pool.wakes == 1

    asyncio.run(run())


class Faulty(TestPool):
    """A pool whose wakes fail at once with this error."""

    def __init__(self, error: WakeError | None) -> None:
        super().__init__(SPECS["tiny"])
        self.error = error

    async def wake(self) -> Endpoint:
        """Fail."""
        self.wakes += 1
        if self.error:
            raise self.error
        self._endpoint = Endpoint("http://127.0.0.1:9")
        return self._endpoint

    async def refusal(self) -> APIError:
        """Return the answer to a request."""
        with pytest.raises(APIError) as caught:
            await self.ready()
        return caught.value


@pytest.mark.parametrize(
    ("is_transient", "waits"), [(False, [5, 10, 20, 40, 80, 160, 300, 300]), (True, [5, 10, 20, 30, 30])]
)
def test_waking_that_fails_again_and_again_is_tried_less_and_less_often(
    is_transient: bool, waits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All clients are told the time that is left, and begin no wake before; a wake that succeeds ends that."""
    now = 1000.0
    monkeypatch.setattr(pool_module, "time", SimpleNamespace(monotonic=lambda: now))

    async def run() -> None:
        nonlocal now
        one = Faulty(WakeError("No.", is_transient=is_transient))
        for number, wait in enumerate(waits, 1):
            assert int((await one.refusal()).headers["Retry-After"]) == wait
            now += wait - 1
            again = await one.refusal()
            assert (again.headers["Retry-After"], one.wakes) == ("1", number)
            assert again.message == "Model 'tiny' on H100 did not start; a request in 1 s tries again. No."
            assert ("x-should-retry" in again.headers) is not is_transient
            now += 1
        error, one.error = one.error, None
        await one.ready()
        one.mark_unreachable()
        one.error = error
        assert (await one.refusal()).headers["Retry-After"] == "5"

    asyncio.run(run())


def test_waking_that_is_known_not_to_help_is_tried_as_often_as_that_costs_no_boot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is recorded of a boot may be gone in a moment, and no client is told to come back."""
    now = 1000.0
    monkeypatch.setattr(pool_module, "time", SimpleNamespace(monotonic=lambda: now))

    async def run() -> None:
        nonlocal now
        one = Faulty(WakeError("Recorded.", lasts_s=5.0))
        for number in range(1, 5):
            assert (await one.refusal()).headers == {"x-should-retry": "false"}
            assert one.wakes == number
            now += 5

    asyncio.run(run())


def test_waking_that_failed_makes_clients_of_openai_repeat_nothing() -> None:
    """Although the answer tells when the next wake may begin."""

    async def run() -> None:
        async with serve_gateway() as gateway:
            pool = _pool(gateway)
            pool.fails = "No."
            pool.may_wake.set()
            async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=2) as client:
                with pytest.raises(openai.InternalServerError) as caught:
                    await client.chat.completions.create(model="tiny", messages=[])
            assert caught.value.response.headers["retry-after"] == "5"
            assert len(gateway.lines) == 1

    asyncio.run(run())


def test_waking_error_of_the_engine_keeps_its_status_inside_a_stream() -> None:
    """The headers were sent with 200 before; the event has the engine's status."""
    behaviour = refuses(400, {"message": "too long", "type": "BadRequestError", "param": "messages"})

    async def run() -> None:
        async with Engine(behaviour).serving() as engine, serve_gateway(comment_interval_s=0.05) as gateway:
            pool = _pool(gateway, engine)
            async with gateway.post(STREAMED) as answer:  # the headers are here, the engine is not
                pool.may_wake.set()
                text = await answer.read()
            error = json.loads(text.split(b"data: ")[1])["error"]
            assert (error["status"], error["message"], error["param"]) == (400, "too long", "messages")
            assert json.loads(gateway.lines[0])["status"] == 400
            async with (
                serve_gateway(url=engine.url) as ready,
                ready.post(STREAMED) as answer,
            ):  # not held: the status itself
                assert answer.status == 400

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_waking_stream_whose_prompt_is_too_long_gets_the_error_of_a_ready_pool_as_an_event(path: str) -> None:
    """Only the engine counts tokens. The event has what the answer would have had, by which agents decide."""
    sentence = "This model's maximum context length is 9 tokens. However, your prompt contains 99 input tokens."
    behaviour = refuses(400, {"message": sentence, "type": "BadRequestError"})

    async def run() -> None:
        async with Engine(behaviour).serving() as engine, serve_gateway(comment_interval_s=0.05) as gateway:
            pool = _pool(gateway, engine)
            async with gateway.post(STREAMED, path) as answer:
                pool.may_wake.set()
                text = (await answer.read()).decode()
            async with gateway.post(ASK, path) as answer:
                whole = await answer.json()
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith('data: {"') and "error" in line]
        if path == "/v1/messages":
            assert events[-1]["error"] == whole["error"]
            assert whole["error"]["message"] == f"prompt is too long: 99 tokens > 9 maximum. {sentence}"
        else:
            assert events[0]["error"] == whole["error"] | {"status": 400}
            assert whole["error"]["code"] == "context_length_exceeded"
        assert path != "/v1/responses" or events[1]["response"]["error"]["code"] == "context_length_exceeded"

    asyncio.run(run())


def test_waking_goes_on_when_all_clients_have_left() -> None:
    """The next request finds the pool ready, and nothing waits for ever."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway() as gateway:
            pool = _pool(gateway, engine)
            clients = [asyncio.ensure_future(_status(gateway, ASK)) for _ in range(10)]
            await eventually(lambda: pool.in_use == 10)
            for client in clients:
                client.cancel()
            await eventually(lambda: pool.in_use == 0)
            assert pool.state == "waking"
            pool.may_wake.set()
            assert await _status(gateway, ASK) == 200
            assert pool.wakes == 1

    asyncio.run(run())


def test_waking_anthropic_stream_gets_an_error_event_of_its_kind() -> None:
    """Anthropic's clients look for `event: error`."""

    async def run() -> None:
        async with serve_gateway(comment_interval_s=0.02) as gateway:
            pool = _pool(gateway)
            pool.fails = "No."
            async with gateway.post(STREAMED, "/v1/messages") as answer:  # the headers are here, the engine is not
                pool.may_wake.set()
                text = await answer.read()
            last = text.strip().split(b"\n\n")[-1]
            assert last.startswith(b"event: error\ndata: ")
            assert json.loads(last.split(b"data: ")[1])["type"] == "error"

    asyncio.run(run())
