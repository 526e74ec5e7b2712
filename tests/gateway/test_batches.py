"""Files and batches at the gateway: what clients upload, create and read, and who sees what."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from grpclib.exceptions import StreamTerminatedError

from service.batch import failed_starts, gateway_batches, room, worker
from service.batch import store as batch_store
from service.batch.gateway_batches import GatewayBatches
from service.batch.store import Store
from service.gateway import pool
from service.gateway.clients import ClientRegistry
from service.gateway.key_set import KeySet
from service.keys import digest
from service.usage.database import open_database
from service.usage.ledger import Ledger
from service.usage.limits import KeyLimits
from tests.gateway.upstream import (
    ALICE,
    BOB,
    KEYS,
    Behaviour,
    Engine,
    Request,
    RunningGateway,
    TestPool,
    answers,
    eventually,
    refuses,
    serve_gateway,
)

CHAT = "/v1/chat/completions"
_OPEN: list[openai.AsyncOpenAI] = []


def line(custom_id: str, **fields: Any) -> bytes:
    """Return a line of an input file."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": custom_id}]}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body} | fields).encode() + b"\n"


@asynccontextmanager
async def serve_batches(
    directory: Path,
    behaviour: Behaviour = answers,
    limits: dict[str, KeyLimits] | None = None,
    clients: ClientRegistry | None = None,
    batches: GatewayBatches | None = None,
    **options: Any,
) -> AsyncIterator[tuple[RunningGateway, Engine]]:
    """Serve a gateway with files and batches in a directory, and an engine behind it."""
    extension = batches or GatewayBatches(Store(directory / "batches"))
    clients = clients or ClientRegistry(KEYS, limits)
    async with (
        Engine(behaviour).serving() as engine,
        serve_gateway(clients, url=engine.url, extension=extension, **options) as gateway,
    ):
        try:
            yield gateway, engine
        finally:
            while _OPEN:
                await _OPEN.pop().close()


def client_of(gateway: RunningGateway, key: str = "a-key") -> openai.AsyncOpenAI:
    """Return OpenAI's client, which is closed with the gateway."""
    _OPEN.append(openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0))
    return _OPEN[-1]


def there(directory: Path, pattern: str = "*") -> list[str]:
    """Return the names of all files that a directory of batches has, of all keys."""
    return [found.name for found in directory.glob(f"batches/*/files/{pattern}")]


async def created(client: openai.AsyncOpenAI, content: bytes, window: str = "24h", **options: Any) -> Any:
    """Upload a file and create a batch of it."""
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    create: Any = client.batches.create
    return await create(input_file_id=file.id, endpoint=CHAT, completion_window=window, **options)


async def ended(client: openai.AsyncOpenAI, batch: Any, timeout_s: float = 20.0) -> Any:
    """Return a batch once nothing of it changes any more."""
    async with asyncio.timeout(timeout_s):
        while True:
            batch = await client.batches.retrieve(batch.id)
            if batch.status not in {"validating", "in_progress", "finalizing", "cancelling"}:
                return batch
            await asyncio.sleep(0.02)


async def records(client: openai.AsyncOpenAI, file_id: str | None) -> list[Any]:
    """Return the records of an output or error file."""
    if file_id is None:
        return []
    return [json.loads(text) for text in (await client.files.content(file_id)).text.splitlines()]


def run(work: Callable[[], Any]) -> None:
    """Run a coroutine."""
    asyncio.run(work())


def test_client_of_openai_uploads_creates_and_reads_a_batch(tmp_path: Path) -> None:
    """Each line has one answer, bad ones are told with their number, and the records have OpenAI's fields."""

    async def work() -> None:
        async with serve_batches(tmp_path) as (gateway, engine):
            client = client_of(gateway)
            content = line("a") + b"nonsense\n" + line("b") + line("a") + line("c", url="/v1/embeddings")
            batch = await created(client, content, metadata={"run": "7"})
            assert (batch.object, batch.status, batch.metadata) == ("batch", "validating", {"run": "7"})
            batch = await ended(client, batch)

            assert batch.status == "completed"
            assert batch.request_counts.model_dump() == {"total": 5, "completed": 2, "failed": 3}
            assert batch.errors is None
            assert batch.completed_at >= batch.in_progress_at >= batch.created_at
            out, err = await records(client, batch.output_file_id), await records(client, batch.error_file_id)
            assert {one["custom_id"] for one in out} == {"a", "b"}
            assert out[0]["response"]["body"]["id"] == "x"
            assert out[0]["response"]["status_code"] == 200
            assert {one["error"]["line"]: one["error"]["code"] for one in err} == {
                2: "invalid_json", 4: "duplicate_custom_id", 5: "mismatched_url"
            }  # fmt: skip
            assert len(engine.requests) == 2
            assert {request.headers["x-batch"] for request in engine.requests} == {"1"}
            file = await client.files.retrieve(batch.output_file_id)
            assert (file.purpose, file.bytes) == ("batch_output", len(await _content(client, file.id)))

    run(work)


async def _content(client: openai.AsyncOpenAI, name: str) -> bytes:
    return (await client.files.content(name)).content


def test_another_key_finds_neither_file_nor_batch(tmp_path: Path) -> None:
    """It gets 404 for all routes, and its lists are empty."""

    async def work() -> None:
        async with serve_batches(tmp_path) as (gateway, _):
            alice, bob = client_of(gateway), client_of(gateway, "b-key")
            batch = await ended(alice, await created(alice, line("a")))
            for call in (
                lambda: bob.files.retrieve(batch.input_file_id),
                lambda: bob.files.content(batch.output_file_id),
                lambda: bob.files.delete(batch.input_file_id),
                lambda: bob.batches.retrieve(batch.id),
                lambda: bob.batches.cancel(batch.id),
                lambda: bob.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"),
            ):
                with pytest.raises(openai.NotFoundError):
                    await call()  # type: ignore[no-untyped-call]
            assert not (await bob.files.list()).data
            assert not (await bob.batches.list()).data
            assert len((await alice.files.list()).data) == 2

    run(work)


def test_key_that_is_made_again_for_another_person_finds_nothing_of_the_first_one(tmp_path: Path) -> None:
    """Lines of the first one's batch are not sent in the name of the second one; a rotation keeps everything."""

    def keys(secret: str, identity: str) -> KeySet:
        return KeySet({}, stored={digest(secret.encode()): ("alice", None)}, identities={"alice": identity})

    async def waits(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)
        await answers(request, writer)

    async def work() -> None:
        clients = ClientRegistry.of(keys("first", "1"))
        async with serve_batches(tmp_path, waits, clients=clients) as (gateway, engine):
            first = client_of(gateway, "first")
            batch = await created(first, b"".join(line(f"{number}") for number in range(50)))
            while not engine.requests:  # noqa: ASYNC110 - the engine's own count
                await asyncio.sleep(0.01)
            clients.replace(keys("rotated", "1"))
            assert (await client_of(gateway, "rotated").batches.retrieve(batch.id)).id == batch.id

            clients.replace(keys("second", "2"))
            second = client_of(gateway, "second")
            for call in (second.files.retrieve(batch.input_file_id), second.batches.retrieve(batch.id)):
                with pytest.raises(openai.NotFoundError):
                    await call
            assert not (await second.files.list()).data
            old = Store(tmp_path / "batches").of("alice", "1")
            async with asyncio.timeout(10):
                while not ((found := old.batch(batch.id)) and found.is_final):  # noqa: ASYNC110 - a file
                    await asyncio.sleep(0.02)
            assert found.request_counts.completed < 10
            assert len(engine.requests) < 10

    run(work)


def test_lines_wait_until_the_keys_could_first_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a gateway starts before its database: the key is unknown, and was not revoked."""
    monkeypatch.setattr("service.gateway.clients._UNREAD_RETRY_S", 1)
    keys = KeySet({}, stored={digest(b"first"): ("alice", None)}, identities={"alice": "1"})
    unread = KeySet({digest(b"b-key"): "bob"}, is_complete=False)

    async def waits(_: Request, __: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async def work() -> None:
        async with serve_batches(tmp_path, waits, clients=ClientRegistry.of(keys)) as (gateway, engine):
            batch = await created(client_of(gateway, "first"), b"".join(map(line, "abcdefgh")))
            while not engine.requests:  # noqa: ASYNC110 - the engine's own count
                await asyncio.sleep(0.01)
        clients = ClientRegistry.of(unread)
        async with serve_batches(tmp_path, clients=clients) as (gateway, engine):
            await asyncio.sleep(0.5)
            assert not engine.requests
            clients.replace(keys)
            batch = await ended(client_of(gateway, "first"), batch)
            assert batch.request_counts.model_dump() == {"total": 8, "completed": 8, "failed": 0}

    run(work)


def test_lists_are_pages_newest_first(tmp_path: Path) -> None:
    """OpenAI's client walks through all of them."""

    async def work() -> None:
        async with serve_batches(tmp_path) as (gateway, _):
            client = client_of(gateway)
            made = [(await created(client, line("a"))).id for _ in range(5)]
            first = await client.batches.list(limit=2)
            assert [one.id for one in first.data] == made[:2:-1]
            assert first.has_more
            assert [one.id async for one in client.batches.list(limit=2)] == made[::-1]
            files = [one.id async for one in client.files.list(limit=2, order="asc", purpose="batch")]
            assert files == sorted(files)
            assert len(files) == 5

    run(work)


def test_deleted_file_is_gone_and_one_in_use_is_not_deleted(tmp_path: Path) -> None:
    """A batch that runs needs its input."""
    may_answer = asyncio.Event()

    async def waits(request: Request, writer: asyncio.StreamWriter) -> None:
        await may_answer.wait()
        await answers(request, writer)

    async def work() -> None:
        async with serve_batches(tmp_path, waits) as (gateway, _):
            client = client_of(gateway)
            batch = await created(client, line("a"))
            with pytest.raises(openai.ConflictError, match="Cancel the batch"):
                await client.files.delete(batch.input_file_id)
            may_answer.set()
            batch = await ended(client, batch)
            assert (await client.files.delete(batch.input_file_id)).deleted
            with pytest.raises(openai.NotFoundError):
                await client.files.content(batch.input_file_id)
            assert not there(tmp_path, batch.input_file_id)

    run(work)


def failing_pool(gateway: RunningGateway) -> TestPool:
    """Have a gateway's pool of the tiny model fail to wake, and return it."""
    gateway.app._inference._router.find("tiny")
    one = gateway.pools["tiny"]
    one.fails = "Its containers end."
    return one


def test_batch_of_a_model_that_does_not_start_waits_and_loses_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No try of a line counts; they are answered once the model starts."""
    monkeypatch.setattr(pool, "FAILED_FOR_S", 0.4)
    monkeypatch.setattr(worker, "TRIES", 1)

    async def work() -> None:
        async with serve_batches(tmp_path) as (gateway, _):
            one = failing_pool(gateway)
            client = client_of(gateway)
            batch = await created(client, b"".join(line(f"{number}") for number in range(30)))
            await eventually(lambda: one.wakes > 1, timeout_s=15)
            assert (await client.batches.retrieve(batch.id)).request_counts.failed == 0
            one.fails = None
            batch = await ended(client, batch)
            assert batch.request_counts.model_dump() == {"total": 30, "completed": 30, "failed": 0}

    run(work)


def test_lines_of_a_model_that_does_not_start_end_with_the_reason_and_the_next_batch_wakes_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an hour, here 0.5 s, of failed wakes; lines of another model are answered."""
    monkeypatch.setattr(pool, "FAILED_FOR_S", 0.4)
    monkeypatch.setattr(pool, "_LONGEST_S", 0.4)
    monkeypatch.setattr(failed_starts, "GIVEN_UP_S", 0.5)

    async def work() -> None:
        async with serve_batches(tmp_path) as (gateway, _):
            one = failing_pool(gateway)
            client = client_of(gateway)
            other = line("other", body={"model": "other", "messages": []})
            content = other + b"".join(line(f"{number}") for number in range(30))
            batch = await ended(client, await created(client, content))
            assert (batch.status, batch.errors, one.wakes) == ("completed", None, 2)
            assert batch.request_counts.model_dump() == {"total": 31, "completed": 1, "failed": 30}
            for record in await records(client, batch.error_file_id):
                assert record["response"]["status_code"] == 503
                assert record["response"]["body"]["error"]["code"] == "model_failed"
                assert "Its containers end." in record["response"]["body"]["error"]["message"]

            batch = await ended(client, await created(client, content))
            assert batch.request_counts.failed == 30
            assert one.wakes <= 3

            one.fails = None
            one.forget_failure()  # as an operator does
            batch = await ended(client, await created(client, content))
            assert batch.request_counts.completed == 31

    run(work)


def test_batch_on_a_model_that_does_not_start_waits_no_longer_in_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hour goes on over a restart of the gateway, which clients do not see in the batch."""
    monkeypatch.setattr(pool, "FAILED_FOR_S", 0.4)
    batches = Store(tmp_path / "batches")

    async def work() -> None:
        async with serve_batches(tmp_path) as (gateway, _):
            failing_pool(gateway)
            client = client_of(gateway)
            batch = await created(client, line("a"))
            [store] = batches.clients()
            await eventually(lambda: bool((found := store.batch(batch.id)) and found.failed_starts), timeout_s=15)
            assert "failed_starts" not in (await client.batches.retrieve(batch.id)).model_dump()
        monkeypatch.setattr(failed_starts, "GIVEN_UP_S", 0.001)
        async with serve_batches(tmp_path) as (gateway, _):
            one = failing_pool(gateway)
            batch = await ended(client_of(gateway), batch)
            assert (batch.request_counts.failed, one.wakes) == (1, 1)

    run(work)


def test_cancelled_batch_keeps_its_answers_and_says_so_of_the_rest(tmp_path: Path) -> None:
    """What is in flight is answered, nothing more is sent."""
    answered = 0

    async def slow(request: Request, writer: asyncio.StreamWriter) -> None:
        nonlocal answered
        await asyncio.sleep(0.02)
        answered += 1
        await answers(request, writer)

    async def work() -> None:
        async with serve_batches(tmp_path, slow) as (gateway, _):
            client = client_of(gateway)
            batch = await created(client, b"".join(line(f"{number}") for number in range(5000)))
            while answered < 5:  # noqa: ASYNC110 - the engine's own count
                await asyncio.sleep(0.01)
            assert (await client.batches.cancel(batch.id)).status == "cancelling"
            batch = await ended(client, batch)
            assert batch.status == "cancelled"
            out, err = await records(client, batch.output_file_id), await records(client, batch.error_file_id)
            assert len(out) == answered == batch.request_counts.completed
            assert len(out) + len(err) == 5000
            assert {one["error"]["code"] for one in err} == {"batch_cancelled"}
            with pytest.raises(openai.ConflictError):
                await client.batches.cancel(batch.id)

    run(work)


def test_batch_whose_window_ends_has_expired_and_keeps_its_answers(tmp_path: Path) -> None:
    """Each line that has no answer is told so."""

    async def some(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0 if b'"0"' in request.body else 60)
        await answers(request, writer)

    async def work() -> None:
        async with serve_batches(tmp_path, some) as (gateway, _):
            client = client_of(gateway)
            batch = await ended(client, await created(client, b"".join(map(line, "0123")), "4s"))
            assert batch.status == "expired"
            assert [one["custom_id"] for one in await records(client, batch.output_file_id)] == ["0"]
            errors = await records(client, batch.error_file_id)
            assert [(one["custom_id"], one["error"]["code"]) for one in errors] == [
                (name, "batch_expired") for name in "123"
            ]

    run(work)


def test_batch_goes_on_where_the_next_process_finds_it(tmp_path: Path) -> None:
    """Lines that have an answer are not sent again."""

    async def slow(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.02)
        await answers(request, writer)

    async def work() -> None:
        async with serve_batches(tmp_path, slow) as (gateway, engine):
            client = client_of(gateway)
            batch = await created(client, b"".join(line(f"{number}") for number in range(200)))
            while len(engine.requests) < 40:  # noqa: ASYNC110 - the engine's own count
                await asyncio.sleep(0.01)
        first = len(engine.requests)
        async with serve_batches(tmp_path, slow) as (gateway, engine):
            client = client_of(gateway)
            batch = await ended(client, batch)
            assert batch.request_counts.completed == 200
            out = await records(client, batch.output_file_id)
            assert sorted(int(one["custom_id"]) for one in out) == [*range(200)]
            assert len(engine.requests) < 200
            assert first + len(engine.requests) <= 200 + 32  # what was in flight is sent twice

    run(work)


def test_two_gateways_on_one_directory_send_each_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One drives the batches of both; the other one goes on when it ends."""
    monkeypatch.setattr(gateway_batches, "_LOCK_S", 0.1)

    async def work() -> None:
        async with serve_batches(tmp_path) as (second, second_engine):
            async with serve_batches(tmp_path) as (first, first_engine):
                engines = (first_engine, second_engine)
                for gateway in (first, second):
                    client = client_of(gateway)
                    batch = await ended(client, await created(client, b"".join(map(line, "abcdefgh"))))
                    assert batch.request_counts.completed == 8
                assert sorted(len(engine.requests) for engine in engines) == [0, 16]
            client = client_of(second)
            await ended(client, await created(client, line("a")))

    run(work)


def test_lines_wait_for_the_limits_of_their_key_and_leave_room_for_its_other_requests(tmp_path: Path) -> None:
    """None fails with 429; one place of its requests at once stays free."""
    running: list[int] = []

    async def slow(request: Request, writer: asyncio.StreamWriter) -> None:
        running.append(len(running))
        await asyncio.sleep(0.005)
        await answers(request, writer)

    limits = {"alice": KeyLimits(concurrency=3)}

    async def work() -> None:
        most = 0

        async def counts(request: Request, writer: asyncio.StreamWriter) -> None:
            nonlocal most
            most = max(most, engine.running)
            await slow(request, writer)

        async with serve_batches(tmp_path, counts, limits) as (gateway, engine):
            client = client_of(gateway)
            batch = await created(client, b"".join(line(f"{number}") for number in range(30)))
            batch = await ended(client, batch)
            assert batch.request_counts.completed == 30
            assert most == 2

    run(work)


def test_requests_of_a_batch_are_booked_under_the_key_that_created_it(tmp_path: Path) -> None:
    """As many rows as lines, with their tokens."""
    file = tmp_path / "usage.sqlite3"

    async def work() -> None:
        ledger = Ledger(lambda: open_database(file=file))
        async with serve_batches(tmp_path, ledger=ledger) as (gateway, _):
            client = client_of(gateway, "b-key")
            await ended(client, await created(client, b"".join(map(line, "abc"))))
        rows = open_database(file=file).read("SELECT key, model, tokens_in, tokens_out FROM requests")
        assert rows == [("bob", "tiny", 3, 4)] * 3

    run(work)


def test_line_that_the_engine_refuses_stands_in_the_error_file_with_its_status(tmp_path: Path) -> None:
    """And the batch is completed."""

    async def work() -> None:
        async with serve_batches(tmp_path, refuses(400, {"message": "no"})) as (gateway, _):
            client = client_of(gateway)
            batch = await ended(client, await created(client, line("a")))
            assert (batch.status, batch.output_file_id) == ("completed", None)
            (record,) = await records(client, batch.error_file_id)
            assert record["response"]["status_code"] == 400
            assert record["response"]["body"]["error"]["message"] == "no"

    run(work)


def test_pool_is_woken_by_a_batch_and_by_nothing_before(tmp_path: Path) -> None:
    """An upload wakes nothing."""

    async def work() -> None:
        async with serve_batches(tmp_path) as (gateway, _):
            client = client_of(gateway)
            file = await client.files.create(file=("in.jsonl", line("a")), purpose="batch")
            assert not any(pool.wakes for pool in gateway.pools.values())
            batch = await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
            await ended(client, batch)
            assert gateway.pools["tiny"].wakes == 1

    run(work)


def test_deadline_that_the_last_rate_cannot_keep_is_told_at_once(tmp_path: Path) -> None:
    """In the batch's errors, with the figures."""

    async def work() -> None:
        Store(tmp_path / "batches").of("alice").make_directory()
        Store(tmp_path / "batches").save_rate(f"{CHAT} tiny", 0.5)
        async with serve_batches(tmp_path) as (gateway, _):
            client = client_of(gateway)
            content = b"".join(line(f"{number}") for number in range(100))
            batch = await created(client, content, "1m")
            assert [error.code for error in batch.errors.data] == ["deadline_at_risk"]
            assert "100 lines take about 200 s" in batch.errors.data[0].message
            assert (await created(client, content, "1h")).errors is None

    run(work)


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"\n \n", "empty_file"), (b"{}\n" * 11, "too_many_lines"), (b"{}\n" + b"\n" * 20, "too_many_lines")],
)
def test_file_that_can_be_no_batch_fails_it_with_the_reason(
    tmp_path: Path, content: bytes, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is sent."""
    monkeypatch.setattr("service.batch.runner.MAX_LINES", 10)

    async def work() -> None:
        async with serve_batches(tmp_path) as (gateway, engine):
            client = client_of(gateway)
            batch = await ended(client, await created(client, content))
            assert batch.status == "failed"
            assert [error.code for error in batch.errors.data] == [code]
            assert not engine.requests

    run(work)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/models"}, "endpoint"),
        ({"completion_window": "7d"}, "completion_window"),
        ({"completion_window": "25h"}, "completion_window"),
        ({"completion_window": None}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"input_file_id": 7}, "input_file_id"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "expires_after[seconds]"),
    ],
)
def test_batch_with_a_wrong_field_is_refused_by_its_name(tmp_path: Path, fields: dict[str, Any], param: str) -> None:
    """400, and nothing is created."""

    async def work() -> None:
        async with serve_batches(tmp_path) as (gateway, _):
            client = client_of(gateway)
            file = await client.files.create(file=("in.jsonl", line("a")), purpose="batch")
            body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"} | fields
            async with gateway.post(body, "/v1/batches", headers=ALICE) as answer:
                assert answer.status == 400
                assert (await answer.json())["error"]["param"] == param
            assert not (await client.batches.list()).data

    run(work)


def form(*parts: tuple[str, str, bytes]) -> aiohttp.MultipartWriter:
    """Return a form with fields of a name, a filename (empty: none) and a content."""
    writer = aiohttp.MultipartWriter("form-data")
    for name, filename, content in parts:
        part = writer.append(content)
        part.set_content_disposition("form-data", name=name, **({"filename": filename} if filename else {}))
    return writer


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ([("purpose", "", b"batch")], "'file' is missing"),
        ([("file", "a", b"x")], "'purpose' is missing"),
        ([("file", "a", b"x"), ("purpose", "", b"assistants")], "assistants"),
        ([("file", "a", b""), ("purpose", "", b"batch")], "empty"),
        ([("file", "a", b"x"), ("file", "b", b"x"), ("purpose", "", b"batch")], "twice"),
        ([("purpose", "", b"x" * 5000)], "longer than"),
        ([("purpose", "p", b"batch")], "only 'file'"),
        ([("file", "a", b"x"), ("purpose", "", b"batch"), ("expires_after[seconds]", "", b"1")], "expires_after"),
    ],
)
def test_upload_that_is_wrong_is_refused_and_leaves_nothing(
    tmp_path: Path, parts: list[tuple[str, str, bytes]], named: str
) -> None:
    """400, whatever of it had arrived."""

    async def work() -> None:
        async with serve_batches(tmp_path) as (gateway, _):
            async with gateway.http.post(f"{gateway.url}/v1/files", data=form(*parts), headers=ALICE) as answer:
                assert answer.status == 400
                assert named in (await answer.json())["error"]["message"]
            assert not there(tmp_path)

    run(work)


def test_upload_over_the_quota_of_its_key_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there stays, and another key has its own."""
    monkeypatch.setattr(batch_store, "QUOTA", 1000)

    async def work() -> None:
        async with serve_batches(tmp_path) as (gateway, _):
            alice, bob = client_of(gateway), client_of(gateway, "b-key")
            await alice.files.create(file=("a", b"x" * 600), purpose="batch")
            with pytest.raises(openai.APIStatusError) as refused:
                await alice.files.create(file=("a", b"x" * 600), purpose="batch")
            assert (refused.value.status_code, refused.value.code) == (413, "quota_exceeded")
            await bob.files.create(file=("a", b"x" * 600), purpose="batch")
            assert len((await alice.files.list()).data) == 1
            assert len(there(tmp_path)) == 2

    run(work)


def test_file_is_removed_after_thirty_days_or_when_its_owner_wished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is not found from that second on, whenever it is swept."""

    async def work() -> None:
        async with serve_batches(tmp_path) as (gateway, _):
            client = client_of(gateway)
            file = await client.files.create(file=("a", b"x\n"), purpose="batch")
            short: Any = {"anchor": "created_at", "seconds": 3600}
            brief = await client.files.create(file=("a", b"x\n"), purpose="batch", expires_after=short)
            assert (file.expires_at or 0) - file.created_at == 30 * 86_400
            later = file.created_at + 4000.0
            monkeypatch.setattr(batch_store.time, "time", lambda: later)
            with pytest.raises(openai.NotFoundError):
                await client.files.retrieve(brief.id)
            assert [one.id for one in (await client.files.list()).data] == [file.id]
            Store(tmp_path / "batches").of("alice").remove_expired(later)
            assert there(tmp_path) == [file.id]

    run(work)


def _slow_form(size: int, may_end: asyncio.Event) -> AsyncIterator[bytes]:
    async def pieces() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * size
        await may_end.wait()
        yield b'\r\n--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'

    return pieces()


def test_uploads_at_once_have_the_room_of_their_key_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them is whole yet; the fifth one is asked to wait."""
    monkeypatch.setattr(batch_store, "QUOTA", 1000)

    async def work() -> None:
        async with serve_batches(tmp_path) as (gateway, _):
            headers = {**ALICE, "content-type": "multipart/form-data; boundary=b"}
            may_end = asyncio.Event()

            async def upload(size: int) -> tuple[int, str]:
                url, data = f"{gateway.url}/v1/files", _slow_form(size, may_end)
                async with gateway.http.post(url, data=data, headers=headers) as answer:
                    found = await answer.json()
                    return answer.status, found.get("error", {}).get("code", "")

            running = [asyncio.create_task(upload(size)) for size in (400, 400, 10, 10)]
            async with asyncio.timeout(5):
                while len(there(tmp_path, ".upload-*")) < 4:  # noqa: ASYNC110 - a directory
                    await asyncio.sleep(0.01)
            assert await upload(10) == (429, "too_many_uploads")
            may_end.set()
            assert [status for status, _ in await asyncio.gather(*running)] == [200] * 4
            may_end.clear()
            running = [asyncio.create_task(upload(150)) for _ in range(2)]
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            may_end.set()
            assert sorted(await asyncio.gather(*running)) == [(200, ""), (413, "quota_exceeded")]

    run(work)


def test_upload_to_a_full_disk_is_507_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of batches need what is left."""
    monkeypatch.setattr(room, "_FREE", 1 << 62)

    async def work() -> None:
        async with serve_batches(tmp_path) as (gateway, _):
            with pytest.raises(openai.InternalServerError) as refused:
                await client_of(gateway).files.create(file=("a", b"x"), purpose="batch")
            assert (refused.value.status_code, refused.value.code) == (507, "disk_full")
            assert not there(tmp_path)

    run(work)


def test_file_or_batch_that_cannot_be_published_is_503_and_leaves_nothing(tmp_path: Path) -> None:
    """OpenAI's clients send it again by themselves, and so make one of it."""
    failures: list[OSError] = []

    def publish() -> None:
        if failures:
            raise failures.pop()

    async def refused(work: Awaitable[object]) -> None:
        failures.append(OSError("The volume was not committed"))
        with pytest.raises(openai.InternalServerError) as error:
            await work
        assert (error.value.status_code, error.value.code) == (503, "storage_unavailable")
        assert error.value.response.headers["retry-after"] == "5"

    async def work() -> None:
        store = Store(tmp_path / "batches", publish)
        async with serve_batches(tmp_path, batches=GatewayBatches(store)) as (gateway, engine):
            client = client_of(gateway)
            await refused(client.files.create(file=("in.jsonl", line("a")), purpose="batch"))
            assert not there(tmp_path)
            file = await client.files.create(file=("in.jsonl", line("a")), purpose="batch")
            create: Any = client.batches.create
            options = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
            await refused(create(**options))
            assert not (await client.batches.list()).data
            assert (await ended(client, await create(**options))).status == "completed"
            failures.append(OSError("The volume was not committed"))
            assert (await client.files.delete(file.id)).deleted
            assert not failures
            assert len(engine.requests) == 1

    run(work)


def test_batch_that_was_created_is_answered_whatever_follows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An error would have the client create it twice."""

    async def fails(*_: object) -> None:
        raise StreamTerminatedError("Connection lost")

    async def work() -> None:
        batches = GatewayBatches(Store(tmp_path / "batches"), on_create=fails)
        async with serve_batches(tmp_path, batches=batches) as (gateway, _):
            client = client_of(gateway)
            assert (await ended(client, await created(client, line("a")))).status == "completed"

    run(work)
    assert "Connection lost" in caplog.text


def test_file_whose_content_is_gone_is_404(tmp_path: Path) -> None:
    """And no transfer that breaks."""

    async def work() -> None:
        async with serve_batches(tmp_path) as (gateway, _):
            client = client_of(gateway)
            file = await client.files.create(file=("a", b"x"), purpose="batch")
            Store(tmp_path / "batches").of("alice").content(file.id).unlink()
            with pytest.raises(openai.NotFoundError):
                await client.files.content(file.id)

    run(work)


def test_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    """The client's connection ended within its file."""

    async def work() -> None:
        async with serve_batches(tmp_path) as (gateway, _):
            host, port = gateway.url.removeprefix("http://").split(":")
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(
                b"POST /v1/files HTTP/1.1\r\nhost: 127.0.0.1\r\nx-api-key: b-key\r\ncontent-length: 5000000\r\n"
                b"content-type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
                b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * 2_000_000
            )
            await writer.drain()
            async with asyncio.timeout(5):
                while not there(tmp_path, ".upload-*"):  # noqa: ASYNC110 - a directory
                    await asyncio.sleep(0.01)
            writer.close()
            async with asyncio.timeout(5):
                while there(tmp_path, ".upload-*"):  # noqa: ASYNC110 - likewise
                    await asyncio.sleep(0.01)

    run(work)


def test_gateway_without_files_and_batches_answers_404() -> None:
    """In OpenAI's shape."""

    async def work() -> None:
        async with (
            serve_gateway(ClientRegistry(KEYS)) as gateway,
            gateway.http.get(f"{gateway.url}/v1/batches", headers=BOB) as answer,
        ):
            assert answer.status == 404
            assert (await answer.json())["error"]["code"] == "route_not_found"

    run(work)
