"""Keys that operators make: their records, how they change, and what is kept of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.errors import ServiceError, UsageError
from service.keys import digest
from service.usage.database import open_database
from service.usage.key_records import DatabaseKeys, KeyConflictError, KeyRecord, StoredKey, database_keys
from service.usage.keys import GRACE_S, Keys
from service.usage.limits import KeyLimits, parse_time

NOW = 1_796_000_000.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DatabaseKeys]:
    """Return an empty store."""
    file = tmp_path / "usage.sqlite3"
    store = DatabaseKeys(lambda: open_database(file=file), file)
    yield store
    store.close()


def test_new_key_is_kept_as_its_digest_alone(store: DatabaseKeys, tmp_path: Path) -> None:
    """Neither the record nor the file has the key."""
    record, key = Keys(store, clock=lambda: NOW).new("alice", {"requests_per_minute": 60})

    assert record == store.load()["alice"]
    stored = StoredKey(digest(key.encode()), NOW)
    assert record == KeyRecord("alice", 1, (stored,), KeyLimits(requests_per_minute=60), created_at=NOW)
    store.close()
    assert [file for file in tmp_path.iterdir() if key.encode() in file.read_bytes()] == []
    assert "digest" not in str(record.to_fields(NOW))


def test_store_without_a_file_is_empty_and_makes_none(store: DatabaseKeys, tmp_path: Path) -> None:
    """A service that has no keys leaves nothing behind."""
    assert store.load() == {}
    assert [*tmp_path.iterdir()] == []


def test_rotated_key_stays_valid_for_its_grace(store: DatabaseKeys) -> None:
    """A day unless another time is given; the key before that is not made valid for longer."""
    times = [NOW]
    keys = Keys(store, clock=lambda: times[-1])
    keys.new("alice", {})
    record, _ = keys.rotate("alice")
    assert [key.ends_at for key in record.keys] == [None, NOW + GRACE_S]

    times.append(NOW + 10)
    record, newest = keys.rotate("alice", 3600)
    assert [key.ends_at for key in record.keys] == [None, NOW + 3610, NOW + 3610]
    record, _ = keys.rotate("alice", 0)
    assert [key.is_valid(NOW + 10) for key in record.keys] == [True]
    assert digest(newest.encode()) not in {key.digest for key in record.keys}

    times.append(NOW + 3610)
    assert len(keys.rotate("alice", 60)[0].keys) == 2


def test_client_keeps_its_identity_until_its_name_is_made_again(store: DatabaseKeys) -> None:
    """Whoever gets the name later is another client; a record of an earlier release has that of its first key."""
    times = [NOW]
    keys = Keys(store, clock=lambda: times[-1])
    first = keys.new("alice", {})[0].identity
    times.append(NOW + 10)
    assert keys.rotate("alice", 0)[0].identity == first
    assert keys.limit("alice", {"admin": True}).identity == first
    assert store.load()["alice"].identity == first
    keys.revoke("alice")
    assert keys.new("alice", {})[0].identity != first

    old = KeyRecord("bob", 1, (StoredKey("d", NOW),))
    store.save(old)
    assert keys.rotate("bob", 0)[0].identity == old.identity


def test_revoked_name_has_no_keys_and_can_be_made_again(store: DatabaseKeys) -> None:
    """The old key stays revoked."""
    keys = Keys(store, clock=lambda: NOW)
    _, old = keys.new("alice", {"admin": True})
    assert keys.revoke("alice").keys == ()
    for change in (keys.revoke, keys.rotate):
        with pytest.raises(UsageError, match="'alice' was revoked"):
            change("alice")

    record, _ = keys.new("alice", {})

    assert digest(old.encode()) not in {key.digest for key in record.keys}
    assert (record.limits, record.revoked_at) == (KeyLimits(), None)


def test_limits_change_one_by_one_and_are_lifted_by_nothing_or_zero(store: DatabaseKeys) -> None:
    """Those that are not named stay."""
    keys = Keys(store)
    keys.new("alice", {"concurrency": 4, "models": ["tiny"]})
    keys.limit("alice", {"tokens_per_day": 10})
    keys.limit("alice", {"concurrency": 0, "models": None, "admin": True})

    assert keys.limit("alice", {"admin": False}).limits == KeyLimits(tokens_per_day=10)


def test_end_of_a_key_is_never_moved_into_the_past(store: DatabaseKeys) -> None:
    """Other limits of a key that has expired may be changed all the same."""
    now = 0.0
    keys = Keys(store, clock=lambda: now)
    keys.new("alice", {"expires": "2020-01-01"})
    now = parse_time("2020-01-02")

    assert keys.limit("alice", {"concurrency": 2, "expires": "2020-01-01"}).limits.concurrency == 2
    with pytest.raises(UsageError, match="'expires' is 2020-01-02, which is not in the future"):
        keys.limit("alice", {"expires": "2020-01-02"})


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        ({"concurrency": -1}, "'concurrency' is -1"),
        ({"rpm": 1}, "unknown field 'rpm'"),
        ({"expires": "soon"}, "'soon' is no date"),
        ({"expires": "2020-01-01"}, "'expires' is 2020-01-01, which is not in the future"),
        ({"dollars_per_month": float("inf")}, "dollars_per_month"),
        ({"models": "tiny"}, "models"),
        ({"requests_per_minute": True}, "requests_per_minute"),
    ],
)
def test_limit_that_is_wrong_is_refused(store: DatabaseKeys, limits: dict[str, object], match: str) -> None:
    """Nothing is made: a limit that does not apply is worse than none."""
    with pytest.raises(UsageError, match=match):
        Keys(store).new("alice", limits)
    assert store.load() == {}


@pytest.mark.parametrize("name", ["", "a b", "a\n", "-a", "ä", "x" * 65, "(operator)", "../a", "anonymous"])
def test_name_that_is_not_allowed_is_refused(store: DatabaseKeys, name: str) -> None:
    """It stands in logs, headers and tables."""
    with pytest.raises(UsageError, match="cannot be the name"):
        Keys(store).new(name, {})


def test_name_that_is_taken_is_refused(store: DatabaseKeys) -> None:
    """By a key here, or by one of the environment, which cannot be changed here."""
    keys = Keys(store, lambda: {"default"})
    keys.new("alice", {})
    for name in ("alice", "default"):
        with pytest.raises(UsageError, match="already"):
            keys.new(name, {})
    with pytest.raises(UsageError, match="API_KEYS"):
        keys.limit("default", {"concurrency": 1})
    with pytest.raises(UsageError, match="Did you mean 'alice'"):
        keys.rotate("alcie")


def test_change_of_an_outdated_record_is_refused_by_the_store(store: DatabaseKeys) -> None:
    """Who read the record before another change must read it again."""
    store.save(KeyRecord("alice", 1))
    with pytest.raises(KeyConflictError):
        store.save(KeyRecord("alice", 1))


def test_processes_that_change_keys_at_once_undo_nothing(tmp_path: Path) -> None:
    """Eight commands: each key that was printed is there, and one name is made once."""
    program = """if True:
        import sys
        from service.usage.key_records import database_keys
        from service.usage.keys import Keys
        keys = Keys(database_keys(None))
        print(keys.new(sys.argv[1], {})[0].name)
        keys.limit("shared", {sys.argv[2]: 7})
    """
    keys = Keys(database_keys(None))
    keys.new("shared", {})
    fields = ["requests_per_minute", "tokens_per_minute", "tokens_per_day", "concurrency"]
    runs = [
        subprocess.Popen([sys.executable, "-c", program, name, limit], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for name, limit in zip(["a", "b", "c", "c"], fields, strict=True)
    ]
    ended = [(run.communicate()[1], run.returncode) for run in runs]

    assert sorted(code for _, code in ended) == [0, 0, 0, 1], ended
    records = {record.name: record for record in keys.records()}
    assert set(records) == {"a", "b", "c", "shared"}
    assert len(records["shared"].limits.model_dump(exclude_defaults=True)) == 3


def test_record_of_a_newer_release_is_told(store: DatabaseKeys) -> None:
    """It is not taken for a key without limits."""
    store.save(KeyRecord("alice", 1))
    with pytest.raises(ServiceError, match="newer"):
        KeyRecord.from_json("alice", 2, '{"keys": [], "limits": {"unheard_of": 1}, "revoked_at": null}')
