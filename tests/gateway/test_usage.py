"""What the ledger gets of each request, and who may read it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from service.gateway.clients import ClientRegistry, KeyLimits
from service.in_engine.vllm_service.usage_report import EngineUsage
from service.usage.database import Database, DatabaseError, open_database
from service.usage.ledger import Ledger
from tests.gateway.upstream import (
    ALICE,
    ASK,
    BOB,
    KEYS,
    Engine,
    RunningGateway,
    answers,
    eventually,
    serve_gateway,
    streams,
)

USAGE = EngineUsage(12, 4, 57, 36.0)
HEADERS = {"x-engine-usage": USAGE.to_text().decode(), "x-replica-id": "r1"}
STREAM = {**ASK, "stream": True}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Return a ledger in a file of the test."""
    return Ledger(lambda: open_database(file=tmp_path / "usage.sqlite3"), 0.01)


@asynccontextmanager
async def gateway_with(
    ledger: Ledger, engine: Engine, clients: ClientRegistry | None = None
) -> AsyncIterator[RunningGateway]:
    """Serve a gateway whose ledger has written everything at the end."""
    async with serve_gateway(clients, url=engine.url, ledger=ledger) as gateway:
        yield gateway


def rows(ledger: Ledger, *columns: str) -> list[tuple[Any, ...]]:
    """Return columns of all rows, oldest first."""
    database: Database = ledger.connect()
    found = database.read(f"SELECT {', '.join(columns)} FROM requests ORDER BY number")  # noqa: S608 - the tests' own
    database.close()
    return found


def replies(body: bytes, headers: Mapping[str, str]):  # type: ignore[no-untyped-def]
    """Return an engine that answers so."""

    async def behave(_: object, writer: asyncio.StreamWriter) -> None:
        lines = [f"{name}: {value}" for name, value in {**headers, "content-length": str(len(body))}.items()]
        writer.write(("HTTP/1.1 200 OK\r\n" + "\r\n".join(lines) + "\r\n\r\n").encode() + body)
        await writer.drain()

    return behave


def test_answer_brings_tokens_replica_and_cost_and_its_client_sees_none_of_the_headers(ledger: Ledger) -> None:
    """36 s of an H100."""

    async def run() -> None:
        engine = Engine(replies(b"{}", {"content-type": "application/json", **HEADERS}))
        async with engine.serving(), gateway_with(ledger, engine) as gateway, gateway.post(ASK) as answer:
            assert await answer.read() == b"{}"
            assert not set(HEADERS) & {name.lower() for name in answer.headers}

    asyncio.run(run())
    facts = rows(ledger, "key", "model", "status", "tokens_in", "tokens_cached", "tokens_out", "replica", "dollars")
    assert facts == [("anonymous", "tiny", 200, 12, 4, 57, "r1", pytest.approx(0.0395))]


@pytest.mark.parametrize("apart", [False, True], ids=["one write", "two writes"])
def test_stream_brings_its_tokens_in_a_comment_that_its_client_does_not_get(ledger: Ledger, apart: bool) -> None:
    """Whether it comes with the last event or alone."""
    event = b"data: [DONE]\n\n"
    pieces = (event, USAGE.to_comment()) if apart else (event + USAGE.to_comment(),)

    async def run() -> None:
        engine = Engine(streams(b"data: {}\n\n", *pieces, pause_s=0.02))
        async with engine.serving(), gateway_with(ledger, engine) as gateway, gateway.post(STREAM) as answer:
            assert await answer.read() == b"data: {}\n\n" + event

    asyncio.run(run())
    assert rows(ledger, "tokens_in", "tokens_cached", "tokens_out") == [(12, 4, 57)]


def test_stream_ends_with_its_cost_in_a_comment_for_a_client_that_asks_for_it(ledger: Ledger) -> None:
    """36 s of an H100, as the ledger has it; one that did not ask gets no comment, and neither does an answer."""

    async def run() -> None:
        engine = Engine(streams(b"data: [DONE]\n\n", USAGE.to_comment(), pause_s=0.02))
        headers = {"X-Report-Cost": "1"}
        async with engine.serving(), gateway_with(ledger, engine) as gateway:
            async with gateway.post(STREAM, headers=headers) as answer:
                assert await answer.read() == b"data: [DONE]\n\n: cost 0.03950000 USD\n\n"
            async with gateway.post(STREAM) as answer:
                assert await answer.read() == b"data: [DONE]\n\n"
        assert "x-report-cost" not in {name.lower() for name in engine.requests[0].headers}

    asyncio.run(run())
    assert rows(ledger, "dollars") == [(pytest.approx(0.0395),), (pytest.approx(0.0395),)]


def test_answer_that_is_no_stream_has_its_cost_in_a_header_for_a_client_that_asks_for_it(ledger: Ledger) -> None:
    """As the ledger has it; one that did not ask gets no such header."""

    async def run() -> None:
        engine = Engine(replies(b"{}", {"content-type": "application/json", **HEADERS}))
        async with engine.serving(), gateway_with(ledger, engine) as gateway:
            async with gateway.post(ASK, headers={"X-Report-Cost": "1"}) as answer:
                assert (answer.status, answer.headers.get("X-Cost-Usd")) == (200, "0.03950000")
            async with gateway.post(ASK) as answer:
                assert (answer.status, answer.headers.get("X-Cost-Usd")) == (200, None)

    asyncio.run(run())


def test_client_that_leaves_and_request_that_is_refused_have_rows_and_other_routes_have_none(ledger: Ledger) -> None:
    """Every request for an engine's work is one row."""

    async def run() -> None:
        engine = Engine(streams(b"data: {}\n\n", ends=False))
        async with engine.serving(), gateway_with(ledger, engine) as gateway:
            async with gateway.post(STREAM) as answer:
                await answer.content.readany()
                answer.close()
            async with gateway.post({"model": "unknown"}) as refused:
                assert refused.status == 404
            async with gateway.http.get(gateway.url + "/v1/models") as listed:
                assert listed.status == 200
            await eventually(lambda: len(gateway.lines) == 3)

    asyncio.run(run())
    assert sorted(rows(ledger, "status", "model", "tokens_in")) == [(404, "-", None), (499, "tiny", None)]


def test_ledger_has_neither_content_nor_key_nor_headers(ledger: Ledger, tmp_path: Path) -> None:
    """Of an answer, a stream and a refusal, whatever is in the files of the database."""
    secrets = ("of-the-prompt", "of-the-answer", "a-key", "of-the-header", "of-the-user")

    async def run() -> None:
        async with (
            Engine(streams(b"data: of-the-answer\n\n")).serving() as engine,
            gateway_with(ledger, engine, ClientRegistry(KEYS)) as gateway,
        ):
            body = {"model": "tiny", "messages": [{"role": "user", "content": "of-the-prompt"}], "user": "of-the-user"}
            for fields in (body, {**body, "stream": True}, {**body, "model": "of-the-prompt"}):
                async with gateway.post(fields, headers={**ALICE, "X-Session-Id": "of-the-header"}) as answer:
                    await answer.read()

    asyncio.run(run())
    assert len(rows(ledger, "key")) == 3
    content = b"".join(file.read_bytes() for file in tmp_path.glob("usage.sqlite3*"))
    assert b"alice" in content
    assert [one for one in secrets if one.encode() in content] == []


def test_requests_without_a_valid_key_have_no_rows(ledger: Ledger) -> None:
    """Anybody can send such, as many as they like."""

    async def run() -> None:
        clients = ClientRegistry(KEYS)
        async with (
            Engine(answers).serving() as engine,
            gateway_with(ledger, engine, clients) as gateway,
            gateway.post(ASK) as answer,
        ):
            assert answer.status == 401

    asyncio.run(run())
    assert rows(ledger, "key") == []


def test_usage_shows_own_rows_and_those_of_all_to_an_admin(ledger: Ledger) -> None:
    """A wrong query is 400 with an example."""
    limits = {"alice": KeyLimits(), "bob": KeyLimits(admin=True)}

    async def run() -> None:
        clients = ClientRegistry(KEYS, limits)
        async with Engine(answers).serving() as engine, gateway_with(ledger, engine, clients) as gateway:
            for headers in (ALICE, BOB, BOB):
                async with gateway.post(ASK, headers=headers) as answer:
                    assert answer.status == 200
            await eventually(lambda: ledger.written == 3)

            async def usage(query: str, headers: Mapping[str, str]) -> tuple[int, Any]:
                async with gateway.http.get(f"{gateway.url}/v1/usage{query}", headers=headers) as answer:
                    return answer.status, await answer.json()

            _, own = await usage("?since=1d", ALICE)
            assert [(row["name"], row["requests"]) for row in own["data"]] == [("alice", 1)]
            _, everybody = await usage("", BOB)
            assert {row["name"]: row["requests"] for row in everybody["data"]} == {"alice": 1, "bob": 2}
            _, models = await usage("?by=model", ALICE)
            assert [(row["name"], row["requests"]) for row in models["data"]] == [("tiny", 1)]
            for query, param in (("?by=hour", "by"), ("?since=once", "since")):
                status, body = await usage(query, ALICE)
                assert (status, body["error"]["param"]) == (400, param)

    asyncio.run(run())


def test_database_that_is_gone_fails_the_reading_of_usage_alone(tmp_path: Path) -> None:
    """Requests are served, and the reader is told to come back."""

    def connect() -> Database:
        raise DatabaseError(f"The database {tmp_path} cannot be used.")

    ledger = Ledger(connect, 0.01)

    async def run() -> None:
        async with Engine(answers).serving() as engine, gateway_with(ledger, engine) as gateway:
            async with gateway.post(ASK) as answer:
                assert answer.status == 200
            async with gateway.http.get(gateway.url + "/v1/usage") as answer:
                error = (await answer.json())["error"]
                assert (answer.status, error["code"]) == (503, "ledger_unavailable")
                assert str(tmp_path) not in error["message"]
                assert answer.headers["Retry-After"] == "5"

    asyncio.run(run())
    assert ledger.lost == 1
