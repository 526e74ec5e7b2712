"""The webhook: what it is told, by whom, how often, and what is kept out of it."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from service.errors import SettingsError
from service.gateway import webhook
from service.gateway.pool import ignore_wake
from service.gateway.webhook import CrashLoops, Webhook, ignore_event
from tests.gateway.upstream import Engine, Request

FIELDS = {"pool": "tiny on L4"}


async def delivered(hook: Webhook) -> None:
    """Wait for the deliveries that have begun."""
    await asyncio.gather(*hook._deliveries)


def test_webhook_gets_an_event_as_a_small_json_body() -> None:
    """A sentence for people and fields for programs; the caller does not wait."""

    async def taken(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        await writer.drain()

    async def run() -> None:
        async with Engine(taken).serving() as server:
            hook = Webhook(f"{server.url}/secret-path", "vllm-gateway")
            hook("first_wake", "First wake.", FIELDS)
            assert server.requests == []
            await delivered(hook)
            (request,) = server.requests
        body = json.loads(request.body)
        assert request.line == "POST /secret-path HTTP/1.1"
        assert body | {"at": ""} == {
            **{"event": "first_wake", "at": "", "service": "vllm-gateway", "text": "First wake."},
            **FIELDS,
        }
        assert len(request.body) < 500

    asyncio.run(run())


def test_webhook_that_refuses_is_asked_three_times_and_its_url_is_in_no_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither where it answers an error or a redirect, nor where nobody listens."""
    monkeypatch.setattr(webhook, "_PAUSES_S", (0.0, 0.0))
    caplog.set_level(logging.DEBUG, "service")

    async def moved(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 302 Found\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()

    async def run() -> None:
        async with Engine(moved).serving() as server:
            hook = Webhook(f"{server.url}/secret-path", "x")
            hook("daily_stop", "Stopped.", {})
            await delivered(hook)
            assert [request.line for request in server.requests] == ["POST /secret-path HTTP/1.1"] * 3
        hook("daily_stop", "Stopped.", {})
        await delivered(hook)

    asyncio.run(run())
    assert [record.getMessage() for record in caplog.records] == [
        "The webhook was not told of daily_stop: it answered 302.",
        "The webhook was not told of daily_stop: ClientConnectorError.",
    ]


def test_webhook_that_does_not_answer_holds_a_bounded_number_of_events(caplog: pytest.LogCaptureFixture) -> None:
    """Further ones are dropped with a warning."""

    async def silent(request: Request, _: asyncio.StreamWriter) -> None:
        await request.gone.wait()

    async def run() -> None:
        async with Engine(silent).serving() as server:
            hook = Webhook(server.url, "x")
            for _ in range(20):
                hook("crash_loop", "Loop.", {})
            assert len(hook._deliveries) == 16
            for delivery in hook._deliveries:
                delivery.cancel()

    asyncio.run(run())
    assert len(caplog.records) == 4


def test_webhook_with_a_wrong_url_is_refused_without_showing_it() -> None:
    """It may be half of a secret; without one nobody is told."""
    for wrong in ("hooks.example/secret", "ftp://hooks.example/secret", "https:///secret"):
        with pytest.raises(SettingsError) as caught:
            Webhook.from_environ({"WEBHOOK_URL": wrong}, "x")
        assert "secret" not in str(caught.value)
    assert Webhook.from_environ({"WEBHOOK_URL": " "}, "x") is ignore_event


def test_crash_loop_is_told_once_until_a_wake_succeeds() -> None:
    """At the third wake in a row that fails."""
    told: list[str] = []
    loops = CrashLoops(lambda event, text, _: told.append(f"{event}: {text}"), ignore_wake)
    for is_ready in (False, False, True, False, False, False, False, True, False, False):
        loops.count_wake("tiny", is_ready)
    loops.count_wake("other", False)
    assert told == ["crash_loop: tiny does not start: 3 wakes in a row failed. Its log: vllm-service logs tiny."]
