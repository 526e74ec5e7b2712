"""The local database: its tables, transactions, errors and permissions."""

from __future__ import annotations

import re
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from service.errors import UsageError
from service.usage.database import DatabaseError, DuplicateRowError, local_file, migrate, open_database
from service.usage.migrations import MIGRATIONS

_INSERT = "INSERT INTO schema_version VALUES (:version)"


def test_local_database_is_made_for_this_user_alone() -> None:
    """It holds digests of keys."""
    open_database().close()

    assert stat.S_IMODE(local_file().stat().st_mode) == 0o600


def test_opened_twice_keeps_its_rows(tmp_path: Path) -> None:
    """The tables are made once."""
    file = tmp_path / "usage.sqlite3"
    first = open_database(file=file)
    first.write(("INSERT INTO writers VALUES (:id, 1, 2, NULL, 0)", [{"id": "a"}]))
    first.close()

    second = open_database(file=file)

    assert second.read("SELECT id, alive_at FROM writers WHERE id = :id", id="a") == [("a", 2.0)]
    second.close()


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    """All statements are one transaction."""
    database = open_database(file=tmp_path / "usage.sqlite3")
    row = ("INSERT INTO writers VALUES (:id, 1, 2, NULL, 0)", [{"id": "a"}])

    with pytest.raises(DuplicateRowError):
        database.write(row, row)

    assert database.read("SELECT * FROM writers") == []
    database.write(row)
    database.close()


def test_migrations_of_newer_release_continue_from_the_version_that_is_there(tmp_path: Path) -> None:
    """Each is run once, and the rows before it stay."""
    file = tmp_path / "usage.sqlite3"
    database = open_database(file=file)
    newer = (*MIGRATIONS, ("CREATE TABLE later (name TEXT)",))

    migrate(database, newer)
    migrate(database, newer)

    assert database.read("SELECT count(*), max(version) FROM schema_version") == [(len(newer), len(newer))]
    with pytest.raises(UsageError, match=f"has version {len(newer)} of its tables"):
        open_database(file=file)
    database.close()


def test_two_processes_that_open_a_new_database_both_get_it(tmp_path: Path) -> None:
    """The second one finds the migration done, before or while it tries it."""
    file = tmp_path / "usage.sqlite3"
    first, second = open_database(file=file), open_database(file=file)

    with pytest.raises(DuplicateRowError):
        second.write((_INSERT, [{"version": 1}]))

    for database in (first, second):
        database.close()


def test_writer_keeps_its_rows_while_its_process_and_another_one_read(tmp_path: Path) -> None:
    """SQLite's locks belong to the process: a file that this one opens and closes beside it would drop them."""
    file = tmp_path / "usage.sqlite3"
    writer = open_database(file=file)
    open_database(file=file).close()
    read = (
        "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute('SELECT count(*) FROM writers').fetchone()[0])"
    )

    def rows() -> int:
        return int(
            subprocess.run([sys.executable, "-c", read, file], capture_output=True, check=True, text=True).stdout
        )

    assert rows() == 0
    writer.write(("INSERT INTO writers VALUES ('a', 1, 2, NULL, 0)", [{}]))

    assert rows() == 1
    writer.close()


def test_file_that_is_no_database_is_told_with_its_path(tmp_path: Path) -> None:
    """The next step is for the operator."""
    file = tmp_path / "usage.sqlite3"
    file.write_bytes(b"no database" * 100)

    with pytest.raises(DatabaseError, match=r"usage\.sqlite3 cannot be used: file is not a database"):
        open_database(file=file)


def test_locked_database_raises_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process's transaction that never ends holds nobody up for ever."""
    monkeypatch.setattr("service.usage.database._BUSY_S", 0.05)
    file = tmp_path / "usage.sqlite3"
    database = open_database(file=file)
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with pytest.raises(DatabaseError, match="locked"):
        database.write((_INSERT, [{"version": 9}]))

    other.close()
    database.close()


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("mysql://u:secret@h/d", "is not the URL of a PostgreSQL database"),
        ("postgresql://u:secret@h", "is not the URL of a PostgreSQL database"),
        ("://secret", "is not the URL of a PostgreSQL database"),
        ("postgresql://u:geh@secret/secret@h/d", "has more than one @"),
        ("postgresql://u:geh@a/secret?secret@h/d", "has more than one @"),
        ("postgresql://u:geh@a:secret@h/d", "has more than one @"),
        ("postgresql://u:secret@h:abc/d", "has no number as its port"),
        ("postgresql://u:secret@h:99999/d", "has the port 99999"),
        ("postgresql://u:secret@h:-1/d", "has the port -1"),
        ("postgresql://u:secret@h:1,h2:2/d", "has no number as its port"),
        ("postgresql://u:secret@h,h2/d", "has 'h,h2' in place of the name or address of one host"),
        ("postgresql://u:secret@a..b/d", "has 'a..b' in place of the name or address of one host"),
        ("postgresql://u:secret@h/d?channel_binding=require", "has 'channel_binding' after its ?"),
        ("postgresql://u:secret@h/d?sslmode=on", "has sslmode=on"),
        ("postgresql://u:secret@h/d?sslmode=require&sslmode=disable", "has sslmode="),
    ],
)
def test_url_that_cannot_be_used_is_refused_without_showing_its_password(url: str, what: str) -> None:
    """It says what is wrong in it, and what to write."""
    with pytest.raises(UsageError, match=re.escape(f"SERVICE_DATABASE_URL {what}")) as caught:
        open_database(url)

    assert caught.value.hint
    assert "secret" not in caught.value.to_terminal()


@pytest.mark.parametrize("query", ["", "?sslmode=require", "?sslmode=verify-full", "?ssl=disable"])
def test_database_that_is_not_there_is_told_without_its_password(query: str) -> None:
    """Host and database name are enough to find the mistake; managed databases' URLs have an `sslmode`."""
    with pytest.raises(DatabaseError, match=r"PostgreSQL at 127\.0\.0\.1/usage cannot be used") as caught:
        open_database(f"postgresql://u:secret@127.0.0.1:1/usage{query}")

    assert "secret" not in str(caught.value)
