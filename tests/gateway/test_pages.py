"""Lists of 10,000 rows come in pages: each of at most 100 KB, and of little processor time."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

from service.gateway.clients import ClientRegistry
from service.usage import report
from service.usage.database import Database, open_database
from service.usage.key_files import FileKeys
from service.usage.key_records import DatabaseKeys, KeyRecord, StoredKey
from service.usage.keys import Keys
from service.usage.ledger import Ledger, insertion
from service.usage.limits import KeyLimits
from service.usage.records import UsageRecord
from tests.gateway.test_admin import admin_gateway, ask
from tests.gateway.upstream import ALICE, KEYS, serve_gateway
from tests.processor_time import bare_s

ROWS, LIMIT_BYTES = 10_000, 100_000
CPU_LIMIT = 4  # times the processor time of a Python that does nothing; 1 was measured


def name(number: int) -> str:
    """Return the name of a key, of the greatest length."""
    return f"key-{number:05d}".ljust(64, "x")


def fill_keys(database: Database) -> None:
    """Make many keys."""
    record = KeyRecord("", 1, (StoredKey("a" * 64, 1.0),), KeyLimits(requests_per_minute=60)).to_json()
    rows = [{"name": name(number), "version": 1, "at": 1.0, "record": record} for number in range(ROWS)]
    database.write(("INSERT INTO api_keys (name, version, at, record) VALUES (:name, :version, :at, :record)", rows))


def fill_usage(database: Database) -> None:
    """Have each of many keys make a request."""
    records = {
        number: UsageRecord(at=time.time(), key=name(number), model="m", seconds=1.0, status=200, dollars=1.0 + number)
        for number in range(ROWS)
    }
    database.write(*insertion("writer", records))


def test_keys_of_10_000_come_in_pages(tmp_path: Path) -> None:
    """In the order of names, each once, those of the environment first; further ones are told of."""
    file = tmp_path / "usage.sqlite3"
    database = open_database(file=file)
    fill_keys(database)
    database.close()
    store = DatabaseKeys(lambda: open_database(file=file), file)
    keys = Keys(store)
    times = []
    for after in ("", name(5000), name(ROWS - 101)):
        began = time.process_time()
        assert len(keys.page(after, 101)) in {100, 101}
        times.append(time.process_time() - began)
    assert min(times) <= CPU_LIMIT * bare_s()

    async def run() -> None:
        async with admin_gateway(store) as gateway:
            seen: list[str] = []
            after, more = "", True
            while more and len(seen) < 450:
                _, answer = await ask(gateway, f"/admin/keys?limit=100&after={after}")
                assert len(json.dumps(answer)) <= LIMIT_BYTES
                seen += [one["name"] for one in answer["keys"]]
                after, more = seen[-1], answer["more"]
            assert seen == [*KEYS.values(), *map(name, range(500))]
            _, last = await ask(gateway, f"/admin/keys?limit=100&after={name(ROWS - 51)}")
            assert (len(last["keys"]), last["more"]) == (50, False)

    asyncio.run(run())


def test_keys_in_files_have_the_same_pages(tmp_path: Path) -> None:
    """Only the files of a page are read."""
    keys = Keys(FileKeys(tmp_path, lambda: None))
    for one in ("bob", "alice", "carol"):
        keys.new(one, {})
    (tmp_path / "zoe.json").write_text("damaged")
    assert [record.name for record in keys.page("", 2)] == ["alice", "bob"]
    assert [record.name for record in keys.page("bob", 1)] == ["carol"]


def test_usage_of_10_000_keys_comes_in_pages(tmp_path: Path) -> None:
    """Those that cost most first; the total is that of all, and the operator's rows end the last page."""
    file = tmp_path / "usage.sqlite3"
    database = open_database(file=file)
    fill_usage(database)
    times = []
    for offset in (0, 5000, 9900):
        began = time.process_time()
        report.usage(database, "key", None, None, report.Page(201, offset))
        report.usage_total(database)
        times.append(time.process_time() - began)
    assert min(times) <= CPU_LIMIT * bare_s()
    database.close()

    async def run() -> None:
        clients = ClientRegistry(KEYS, {"alice": KeyLimits(admin=True)})
        async with serve_gateway(clients, ledger=Ledger(lambda: open_database(file=file))) as gateway:

            async def page(offset: int) -> Any:
                url = f"{gateway.url}/v1/usage?by=key&limit=200&offset={offset}"
                async with gateway.http.get(url, headers=ALICE) as answer:
                    body = await answer.read()
                assert len(body) <= LIMIT_BYTES
                return json.loads(body)

            first, second, last = await page(0), await page(200), await page(9900)
            assert [one["name"] for one in first["data"]] == [name(number) for number in range(9999, 9799, -1)]
            assert second["data"][0]["name"] == name(9799)
            assert (first["more"], last["more"], len(last["data"])) == (True, False, 100)
            assert first["total"]["requests"] == ROWS
            assert first["total"]["dollars"] == sum(1.0 + number for number in range(ROWS))

    asyncio.run(run())
