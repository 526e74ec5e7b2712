"""Requests for a model before any engine: bodies, routes of a task, tools, defaults."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

from service.gateway.clients import ClientRegistry
from service.gateway.http_server.exchange import ON_LEAVE
from service.gateway.inference import _WhileClientStays
from service.gateway.metrics import RequestLog
from service.gateway.uploads import UploadLimits, Uploads
from service.registry.models import ModelSpec, Registry
from service.usage.limits import KeyLimits
from tests.engine.routes import error_of
from tests.gateway.upstream import ALICE, ASK, KEYS, SPECS, Engine, answers, serve_gateway


@pytest.mark.parametrize(
    ("path", "tool_choice", "status"),
    [
        ("/v1/chat/completions", None, 400),
        ("/v1/chat/completions", "required", 400),
        ("/v1/messages", {"type": "any"}, 400),
        ("/v1/chat/completions", "none", 503),
        ("/v1/messages", {"type": "none"}, 503),
        ("/v1/responses", None, 503),
    ],
)
def test_tools_of_a_model_that_has_no_parser_are_refused_before_a_wake(
    path: str, tool_choice: object, status: int
) -> None:
    """Where it is certain; with `none` no call is asked for, and on the Responses API vLLM does not refuse."""
    registry = Registry({"tiny": ModelSpec(key="tiny", path="tiny", tool_call_parser="none")})
    tool = {"type": "function", "function": {"name": "f"}} if path.endswith("completions") else {"name": "f"}
    body = {"model": "tiny", "messages": [], "tools": [tool]} | ({"tool_choice": tool_choice} if tool_choice else {})

    async def run() -> None:
        async with serve_gateway(registry=registry, hold_s=0) as gateway, gateway.post(body, path) as answer:
            text = await answer.text()
            assert answer.status == status, text
            assert gateway.pools["tiny"].wakes == (status == 503)
            assert status == 503 or "Set tool_call_parser in its entry" in text

    asyncio.run(run())


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({"tools": [{}]}, {"temperature": 0.3, "tool_choice": "auto"}),
        ({"tools": [{}], "temperature": 1}, {"temperature": 1, "tool_choice": "auto"}),
        ({"tools": [{}], "tool_choice": "none"}, {"temperature": 0.3, "tool_choice": "none"}),
        ({}, {}),
    ],
)
def test_name_with_local_fills_in_defaults_for_tools(given: dict[str, object], added: dict[str, object]) -> None:
    """Clients of the seeds rely on it; fields that the request sets itself stay."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            async with gateway.post({"model": "tiny-local", **given}) as answer:
                assert answer.status == 200
            assert json.loads(engine.requests[0].body) == {"model": "tiny", **given, **added}

    asyncio.run(run())


@pytest.mark.parametrize("sent", [b"", b'{"model"'])
def test_body_that_stalls_is_408_and_gives_its_place_back(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection ends, and the next request of the key is served."""
    monkeypatch.setattr("service.gateway.inference.Uploads", lambda: Uploads(UploadLimits(piece_s=0.3, sweep_s=0.1)))
    clients = ClientRegistry(KEYS, {"alice": KeyLimits(concurrency=1)})
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a-key\r\n"
        b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    )

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(clients, url=engine.url) as gateway:
            host, port = gateway.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(head + sent)
            await asyncio.sleep(0.1)
            async with gateway.post(ASK, headers=ALICE) as answer:
                assert answer.status == 429
            async with asyncio.timeout(5):
                got = await reader.read()
            writer.close()
            assert got.startswith(b"HTTP/1.1 408 ")
            assert b"\r\nconnection: close\r\n" in got
            assert b"body_too_slow" in got
            async with gateway.post(ASK, headers=ALICE) as answer:
                assert answer.status == 200
            assert [json.loads(line)["status"] for line in gateway.lines] == [429, 408, 200]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "size", "status"), [("/tokenize", 2**20 + 1, 413), ("/v1/completions", 2**25 + 1, 413)]
)
def test_body_over_the_limit_is_refused(path: str, size: int, status: int) -> None:
    """By its declared length before it is read, or while it arrives where it declares none."""

    async def pieces():  # type: ignore[no-untyped-def]
        for _ in range(size // 65536 + 1):
            yield b" " * 65536

    async def run() -> None:
        async with serve_gateway() as gateway:
            for declared in ({"Content-Length": str(size)}, {}):
                headers = {"Content-Type": "application/json", **declared}
                async with gateway.http.post(gateway.url + path, headers=headers, data=pieces()) as answer:
                    assert answer.status == status

    asyncio.run(run())


@pytest.mark.parametrize(
    ("model", "path", "advice"),
    [
        ("tiny", "/v1/embeddings", "Choose one whose task is embed: vectors."),
        ("vectors", "/v1/chat/completions", "Choose one whose task is generate: tiny."),
        ("vectors", "/v1/messages", "Choose one whose task is generate: tiny."),
    ],
)
def test_route_that_a_model_does_not_serve_is_400_and_wakes_nothing(
    model: str, path: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry knows what each model does; of a model in no registry the engine knows."""
    monkeypatch.setitem(SPECS, "vectors", ModelSpec(key="vectors", path="x", task="embed"))
    body = {"model": model, "input": "a", "messages": [], "max_tokens": 1}

    async def run() -> None:
        async with Engine(answers).serving() as engine, serve_gateway(url=engine.url) as gateway:
            async with gateway.post(body, path) as answer:
                error = error_of(await answer.read(), path)
                assert (answer.status, error["type"]) == (400, "invalid_request_error")
                assert error.get("code", "unsupported_by_model") == "unsupported_by_model"
                assert error["message"].endswith(advice)
            assert all(pool.wakes == 0 for pool in gateway.pools.values())
            async with gateway.post(body | {"model": "other"}, path) as answer:
                assert answer.status == 200

    asyncio.run(run())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/chat/completions", 415),
        ("POST", "/v1/responses/resp_1/cancel", 404),
        ("POST", "/v1/responses/resp_1", 405),
        ("HEAD", "/v1/responses/resp_1", 405),
        ("GET", "/v1/responses/resp_1", 404),
        ("GET", "/metrics?model=tiny", 404),
        ("GET", "/v1/responses/%C3%A9", 404),
        ("GET", "/v1/chat/completions//", 404),
        ("GET", "/v1/chat/completions/", 405),
        ("GET", "/v1/models/nope", 404),
    ],
)
def test_request_that_needs_no_engine_wakes_none(method: str, path: str, status: int) -> None:
    """An empty body, and routes that only a running engine can answer."""

    async def run() -> None:
        async with serve_gateway() as gateway:
            async with gateway.http.request(method, gateway.url + path) as answer:
                assert answer.status == status
                assert method == "HEAD" or "error" in await answer.json()
            assert all(pool.wakes == 0 for pool in gateway.pools.values())

    asyncio.run(run())


@pytest.mark.parametrize("tells", [True, False])
def test_task_whose_client_left_goes_on_as_one_that_was_never_cancelled(tells: bool) -> None:
    """A timeout around it would take the cancellation for its own, or for that of whoever waits for the task."""
    leave: list[Callable[[], None] | None] = []
    gone = asyncio.Event()

    async def receive() -> dict[str, str]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        log = RequestLog("id", "POST", "/v1/completions")
        scope = {"extensions": {ON_LEAVE: leave.append}} if tells else {}
        async with _WhileClientStays(scope, receive, log):
            if tells and leave[0]:
                leave[0]()
            gone.set()
            await asyncio.sleep(5)
        task = asyncio.current_task()
        assert task is not None
        assert (task.cancelling(), log.status, log.client_left) == (0, 499, True)

    asyncio.run(run())
