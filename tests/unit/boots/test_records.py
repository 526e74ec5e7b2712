"""Records of boots: what is kept, what is read back, and that nothing damaged stops a listing."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from service.boots import groups, records
from service.boots.records import BootRecord, Span

RECORD = BootRecord(
    id="1m7xxpyr9hkan",
    at="2026-11-20T09:00:00+00:00",
    model="qwen3-8b",
    revision="220b46e3",
    gpu="2 x H200",
    strategy="gpu",
    restored=True,
    fast_boot=False,
    versions=MappingProxyType({"vllm": "0.32.0", "driver": "580.95"}),
    phases=(Span("load", -20.0, 0.0), Span("queue", 0.0, 1.5), Span("something new", 1.0, 7.25)),
    bytes_read=8_900_000_000,
    outcome="ready",
    reason=None,
    seconds=7.25,
)


def record(**changes: Any) -> BootRecord:
    """Return a record with an id of its own."""
    return dataclasses.replace(RECORD, **{"id": records.new_id(), **changes})


def line(**changes: Any) -> str:
    """Return a record's line with fields of JSON changed."""
    return json.dumps({**RECORD.as_object(), **changes})


def test_record_survives_a_round_trip() -> None:
    """One line, and any name of a phase."""
    assert "\n" not in RECORD.to_line()
    assert BootRecord.from_line(RECORD.to_line()) == RECORD
    assert BootRecord.from_line(RECORD.to_line().encode()) == RECORD


def test_record_of_a_newer_version_is_read_without_what_is_unknown() -> None:
    """In the record and in its phases."""
    phases = [{"name": "load", "start": 0, "end": 2, "bytes": 5}]
    read = BootRecord.from_line(line(phases=phases, region="eu-west"))

    assert read.phases == (Span("load", 0.0, 2.0),)


@pytest.mark.parametrize("field", ["revision", "bytes_read", "reason"])
def test_record_without_an_optional_field_is_read(field: str) -> None:
    """A missing field is read as null."""
    found = {name: value for name, value in RECORD.as_object().items() if name != field}

    assert getattr(BootRecord.from_line(json.dumps(found)), field) is None


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "3", '"text"', "[" * 100_000, "\x00", "{}",
        line(id=5), line(model=None), line(restored=1), line(fast_boot="yes"), line(seconds="7"), line(seconds=True),
        line(seconds=float("nan")), line(seconds=10**400), line(bytes_read=1.5), line(bytes_read=True),
        line(at="yesterday"), line(at="2026-11-20T09:00:00"), line(versions=[]), line(versions={"vllm": 1}),
        line(phases=None), line(phases={}, seconds=None), line(phases=["load"]), line(phases=[{"name": "load"}]),
        line(phases=[{"name": "load", "start": "0", "end": 1}]), line(phases=[[]]), line(reason=["x"]),
    ],
)  # fmt: skip
def test_record_that_is_damaged_is_a_value_error(text: str) -> None:
    """Not JSON, other JSON, a field of another type."""
    with pytest.raises(ValueError, match=r"."):
        BootRecord.from_line(text)


def test_record_is_kept_as_the_same_json_as_ever() -> None:
    """Files of earlier versions and of this one are read by both."""
    assert RECORD.to_line() == (
        '{"id": "1m7xxpyr9hkan", "at": "2026-11-20T09:00:00+00:00", "model": "qwen3-8b", "revision": "220b46e3", '
        '"gpu": "2 x H200", "strategy": "gpu", "restored": true, "fast_boot": false, '
        '"versions": {"vllm": "0.32.0", "driver": "580.95"}, "phases": [{"name": "load", "start": -20.0, "end": 0.0}, '
        '{"name": "queue", "start": 0.0, "end": 1.5}, {"name": "something new", "start": 1.0, "end": 7.25}], '
        '"bytes_read": 8900000000, "outcome": "ready", "reason": null, "seconds": 7.25}'
    )


def test_id_sorts_by_the_time_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without looking into the file."""
    made = []
    for now in (0, 1_700_000_000_000, 1_800_000_000_000, 1_800_000_000_001, 30_000_000_000_000):
        monkeypatch.setattr(records.time, "time_ns", lambda now=now: now * 1_000_000)
        made.append(records.new_id())

    assert made == sorted(made)
    assert all(re.fullmatch("[0-9a-z]{13}", name) for name in made)


def test_new_id_is_unique() -> None:
    """Replicas begin in the same millisecond."""
    assert len({records.new_id() for _ in range(2000)}) > 1990


def test_snapshots_seconds_count_what_overlaps_once() -> None:
    """What was done before time zero, and nothing after it."""
    spans = (Span("a", -30, -10), Span("b", -20, -15), Span("c", -12, -5), Span("d", -2, 4), Span("e", 4, 9))

    assert record(phases=spans).snapshot_seconds == 27
    assert record(phases=()).snapshot_seconds == 0


def test_keep_makes_the_directory_and_one_line_in_it(tmp_path: Path) -> None:
    """Named by the id, and nothing beside it."""
    file = records.keep(RECORD, tmp_path / "a" / "boots")

    assert file == tmp_path / "a" / "boots" / "1m7xxpyr9hkan.json"
    assert file.read_text() == RECORD.to_line() + "\n"
    assert list(file.parent.iterdir()) == [file]


def test_keep_removes_the_oldest_beyond_the_limit_and_nothing_else(tmp_path: Path) -> None:
    """Of records and of what a killed replica left of one; never files of other names."""
    others = [tmp_path / "notes.json", tmp_path / "zzzzzzzzzzzzz", tmp_path / ".hidden"]
    for other in (*others, tmp_path / ".0000000000000.json.part", tmp_path / ".0000000000001.json.0a1b2c3d.tmp"):
        other.write_text("mine")
    kept = [records.keep(record(id=f"100000000000{number}"), tmp_path, limit=3) for number in range(5)]

    assert set(tmp_path.iterdir()) == {*others, *kept[2:]}


def test_keep_by_many_at_a_time_keeps_all(tmp_path: Path) -> None:
    """Several replicas write into one directory, each a file of its own."""
    mine = [record() for _ in range(64)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda one: records.keep(one, tmp_path), mine))

    assert {one.id for one in records.load(tmp_path)} == {one.id for one in mine}


def test_keep_at_an_old_record_that_cannot_be_removed_still_keeps_the_new(tmp_path: Path) -> None:
    """A directory of such a name, say."""
    (tmp_path / "1000000000000.json").mkdir()

    assert records.keep(RECORD, tmp_path, limit=1).exists()


def test_keep_on_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller lets the boot go on; no half of a record is read later."""

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        records.keep(RECORD, tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_keep_in_a_place_that_is_no_directory_is_an_os_error() -> None:
    """The same kind of error, for the same `suppress`."""
    with pytest.raises(OSError, match="/dev/null"):
        records.keep(RECORD, Path("/dev/null/boots"))


def test_load_is_oldest_first_whatever_the_files_are_called(tmp_path: Path) -> None:
    """By time zero, in whatever offset it is given."""
    times = ["2026-11-20T09:00:00Z", "2026-11-20T08:30:00+00:00", "2026-11-20T09:30:00+02:00"]
    for at in times:
        records.keep(record(at=at), tmp_path)

    assert [one.at for one in records.load(tmp_path)] == [times[2], times[1], times[0]]


def test_load_passes_over_what_is_damaged_or_foreign(tmp_path: Path) -> None:
    """Half a file, bytes that are no text, a directory, somebody's notes, a part of a record."""
    file = records.keep(RECORD, tmp_path)
    (tmp_path / "half.json").write_text(file.read_text()[:80])
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "empty.json").touch()
    (tmp_path / "directory.json").mkdir()
    (tmp_path / "dangling.json").symlink_to("nowhere")
    (tmp_path / ".1m7xxpyr9hkan.json.part").write_text(file.read_text())
    (tmp_path / "notes.txt").write_text("x")

    assert records.load(tmp_path) == [RECORD]


def test_load_where_nothing_was_kept_is_empty(tmp_path: Path) -> None:
    """No directory, no file."""
    assert records.load(tmp_path / "none") == []
    assert records.load(tmp_path) == []


def test_local_directory_is_in_the_users_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the engine's log."""
    from service.local.serve import log_file

    assert records.local_directory() == tmp_path / "state" / "vllm-service" / "boots"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert records.local_directory() == Path("/home/somebody/.local/state/vllm-service/boots")
    assert records.local_directory().parent == log_file(8000).parent


def test_import_of_records_brings_in_msgspec_and_the_standard_library_alone() -> None:
    """A replica imports it while a request waits."""
    program = "import sys; before = set(sys.modules); import service.boots.records; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    brought = {name.partition(".")[0] for name in done.stdout.split()}

    assert brought <= set(sys.stdlib_module_names) | {"service", "msgspec", "typing_extensions"}


def test_groups_hold_what_compares_in_the_order_of_strategies() -> None:
    """One model, one GPU, one kind of boot; what was disturbed is counted, and has no part in the median."""
    boots = [
        record(strategy="gpu", restored=True, seconds=8),
        record(strategy="gpu", restored=False, seconds=20),
        record(strategy="gpu", restored=True, seconds=10),
        record(strategy="gpu", restored=True, seconds=90, outcome="cold"),
        record(strategy="off", restored=False, seconds=40),
        record(strategy="cpu", restored=False, seconds=9, outcome="failed"),
        record(strategy="off", restored=False, seconds=41, fast_boot=True),
        record(strategy="off", restored=False, seconds=4, model="a"),
    ]
    found = groups.groups(boots)

    assert [(group.subject, group.kind, group.median) for group in found] == [
        ("a on 2 x H200, without fast boot", "off", 4),
        ("qwen3-8b on 2 x H200", "off", 41),
        ("qwen3-8b on 2 x H200, without fast boot", "off", 40),
        ("qwen3-8b on 2 x H200, without fast boot", "cpu, first boot", None),
        ("qwen3-8b on 2 x H200, without fast boot", "gpu, first boot", 20),
        ("qwen3-8b on 2 x H200, without fast boot", "gpu, restored", 9),
    ]
    assert [(group.count("cold"), group.count("failed")) for group in found][3:] == [(0, 1), (0, 0), (1, 0)]


@pytest.mark.parametrize(
    ("text", "short"),
    [("abcdef", "abcdef"), ("abcdefg", "ab…efg"), (" a\n\x1b[31mb ", "a [31mb"), ("\ud800 x", "x"), ("", "")],
)
def test_shortened_text_is_one_line_that_has_both_ends(text: str, short: str) -> None:
    """A record may hold any text; on a screen it must not move the cursor."""
    assert groups.shortened(text, max(len(short), 6)) == short
