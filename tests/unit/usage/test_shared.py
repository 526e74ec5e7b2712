"""Files of a volume that many containers share: one writer each, and readers that may read them again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.usage import report
from service.usage.database import Database, open_database
from service.usage.ledger import Ledger
from service.usage.records import UsageRecord
from service.usage.replica_records import ReplicaRecorder, process_started_at
from service.usage.shared import SharedLedger, files_in, import_files, imported_files
from service.usage.writer_files import GatewayRecord, ReplicaRecord, Segments, write_record


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Database]:
    """Return the database of who reads the volume."""
    database = open_database(file=tmp_path / "reader.sqlite3")
    yield database
    database.close()


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """Return the directory of usage on a volume."""
    return tmp_path / "volume" / "usage"


def record(**changes: Any) -> UsageRecord:
    """Return a record."""
    facts: dict[str, Any] = {"at": 7200.5, "key": "alice", "model": "tiny", "seconds": 1.0, "status": 200}
    return UsageRecord(**(facts | changes))


def replica(name: str, **changes: Any) -> ReplicaRecord:
    """Return the record of a replica of a dollar a second."""
    facts: dict[str, Any] = {"model": "tiny", "gpu": "H100", "dollars_per_hour": 3600.0, "started_at": 0.0}
    return ReplicaRecord(id=name, **(facts | {"alive_at": 30.0} | changes))


def requests(database: Database) -> dict[str, int]:
    """Return how many requests each key made."""
    return {row.name: row.requests for row in report.usage(database, "key")}


def test_files_read_twice_count_once(volume: Path, reader: Database) -> None:
    """A row that is there already is skipped, also where a file has new ones beside it."""
    segments = Segments(volume, "w")
    segments.add([record(), record(key="bob")])
    segments.write()
    segments.write()  # nothing waits
    segments.add([record(tokens_out=5)])
    segments.write()

    import_files(reader, files_in(volume, set()))
    import_files(reader, files_in(volume, set()))

    assert requests(reader) == {"alice": 2, "bob": 1}
    names = ["requests/w-000000000001-000000000002.jsonl", "requests/w-000000000003-000000000003.jsonl"]
    assert sorted(f"requests/{path.name}" for path in volume.glob("requests/*")) == names
    assert imported_files(reader, [*names, "requests/w-000000000003-000000000004.jsonl", "x"]) == set(names)


def test_many_small_files_become_one_whose_rows_count_once(volume: Path, reader: Database) -> None:
    """So that a month of traffic is no hundred thousand files; at the end a writer has one file."""
    segments = Segments(volume, "w")
    for number in range(250):
        segments.add([record(key=f"key-{number}")])
        segments.write()
        if number == 150:
            import_files(reader, files_in(volume, set()))
    assert len(list(volume.glob("requests/*"))) == 52
    segments.write(closing=True)
    import_files(reader, files_in(volume, set()))

    assert sorted(path.name for path in volume.glob("requests/*")) == [
        "w-000000000001-000000000100.jsonl",
        "w-000000000101-000000000200.jsonl",
        "w-000000000201-000000000250.jsonl",
    ]
    assert requests(reader) == {f"key-{number}": 1 for number in range(250)}


def test_damaged_and_foreign_files_are_skipped(volume: Path, reader: Database) -> None:
    """A killed writer, an older version or a user's own files keep nobody from reading the others."""
    segments = Segments(volume, "w")
    segments.add([record()])
    segments.write()
    for name in ("requests/half.jsonl", "replicas/half.json", "gateways/half.json", "other/x.json"):
        (volume / name).parent.mkdir(parents=True, exist_ok=True)
        (volume / name).write_bytes(b'{"writer": "w", "num')

    import_files(reader, files_in(volume, set()))

    assert requests(reader) == {"alice": 1}


def test_records_of_processes_are_replaced(volume: Path, reader: Database) -> None:
    """The newest state of a replica and of a gateway counts."""
    for alive_at in (30.0, 60.0):
        write_record(volume, replica("r", alive_at=alive_at, ready_at=10.0))
        write_record(volume, GatewayRecord(id="g", started_at=0.0, alive_at=alive_at, lost=2))
        import_files(reader, files_in(volume, set()))

    assert [row.seconds for row in report.operator_rows(reader)] == [10.0, 50.0]
    assert report.unclosed_writers(reader, now=1000.0) == [("g", 60.0)]
    assert report.lost(reader) == 2


def test_two_gateways_see_each_others_rows_after_a_commit(volume: Path, tmp_path: Path) -> None:
    """Each has a database of its own, and skips what it wrote itself."""
    commits: list[None] = []

    def run(name: str, key: str) -> dict[str, int]:
        shared = SharedLedger(volume, lambda: commits.append(None), interval_s=0.01)
        ledger = Ledger(lambda: open_database(file=tmp_path / name), 0.01, shared=shared)
        ledger.start()
        ledger.record(record(key=key))
        deadline = time.monotonic() + 5
        while not list(volume.glob(f"requests/{ledger.id}-*")) or len(commits) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        ledger.close()
        database = ledger.connect()
        found = requests(database)
        database.close()
        return found

    assert run("first", "alice") == {"alice": 1}
    assert run("second", "bob") == {"alice": 1, "bob": 1}


def test_long_history_is_taken_a_little_at_a_time(
    volume: Path, reader: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that end meanwhile are written in between."""
    monkeypatch.setattr("service.usage.shared._IMPORT_S", 0)
    for number in range(5):
        segments = Segments(volume, f"w{number}")
        segments.add([record()])
        segments.write()
    shared = SharedLedger(volume, lambda: None)
    shared.begin("own")
    found = []
    for _ in range(6):
        shared.sync(reader, "own", 0, closing=False)
        found.append(requests(reader).get("alice"))

    assert found == [1, 2, 3, 4, 5, 5]


def test_volume_that_fails_delays_the_files_and_loses_no_row(volume: Path, tmp_path: Path, reader: Database) -> None:
    """The database has them meanwhile."""
    failures = [OSError("No space left on device")]

    def commit() -> None:
        if failures:
            raise failures.pop()

    shared = SharedLedger(volume, commit, interval_s=0.01)
    ledger = Ledger(lambda: open_database(file=tmp_path / "own"), 0.01, shared=shared)
    ledger.start()
    for _ in range(3):
        ledger.record(record())
        time.sleep(0.05)
    ledger.close()
    import_files(reader, files_in(volume, set()))

    assert (ledger.written, ledger.lost, requests(reader)) == (3, 0, {"alice": 3})
    assert report.unclosed_writers(reader, now=time.time() + 1000) == []


def test_process_began_when_the_system_says() -> None:
    """A container is paid while its program is imported too."""
    assert process_started_at() == pytest.approx(psutil.Process().create_time(), abs=1)


def test_replica_records_its_life_and_what_aborted_requests_used(volume: Path, reader: Database) -> None:
    """What it wrote last shows when a killed one was alive."""
    commits: list[None] = []
    started = replica("r", started_at=time.time(), alive_at=time.time())
    recorder = ReplicaRecorder(volume, lambda: commits.append(None), started, interval_s=0.01)
    recorder.mark_ready()
    recorder.add(record(status=0, tokens_out=9))
    while len(commits) < 3:
        time.sleep(0.01)
    import_files(reader, files_in(volume, set()))
    (killed,) = reader.read("SELECT ready_at, alive_at, ended_at FROM replicas")
    recorder.close()
    import_files(reader, files_in(volume, set()))
    (ended,) = reader.read("SELECT alive_at, ended_at FROM replicas")

    assert killed[0] <= killed[1]
    assert killed[2] is None
    assert ended[0] == ended[1] >= killed[1]
    assert [(row.requests, row.tokens_out) for row in report.usage(reader, "key")] == [(0, 9)]
