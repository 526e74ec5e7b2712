"""The database: SQLite in the state directory, or PostgreSQL where `SERVICE_DATABASE_URL` names one.

One interface for both: plain SQL that both understand, with parameters as `:name`. All calls block and belong to one
thread at a time, so a database that is slow or gone holds up the thread that writes and no request.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from service.boots.records import state_directory
from service.errors import ServiceError, UsageError
from service.usage.migrations import MIGRATIONS

FILE = "usage.sqlite3"
PARAMETER = re.compile(r":(\w+)")
_BUSY_S = 5.0  # how long a statement waits for another process's transaction
_AT_ONCE = 50  # rows of one call; a statement of them takes 0.1 MB
_CACHE_KIB = 256  # of pages; 2,000 by default, of which appending rows needs few
Row = tuple[Any, ...]
# A tuple has the values of an INSERT in the order of the names: SQLite takes many such rows at once.
Parameters = Mapping[str, Any] | tuple[Any, ...]
Statement = tuple[str, Sequence[Parameters]]  # SQL, and one set of parameters for each time that it runs


class DatabaseError(ServiceError):
    """The database cannot be used; what was to be written is not written."""

    is_transient = True


class DuplicateRowError(DatabaseError):
    """A row with this primary key is there already."""

    is_transient = False


class Database(Protocol):
    """A database whose tables are there."""

    def write(self, *statements: Statement) -> None:
        """Run statements in one transaction: all of them, or none.

        Raises:
            DuplicateRowError: A row is there already.
            DatabaseError: The database cannot be used.
        """

    def read(self, sql: str, **parameters: Any) -> list[Row]:
        """Return the rows of a query.

        Raises:
            DatabaseError: The database cannot be used.
        """

    def has_table(self, name: str) -> bool:
        """Tell whether a table is there.

        Raises:
            DatabaseError: The database cannot be used.
        """

    def close(self) -> None:
        """Close it; never raises."""


def local_file() -> Path:
    """Return the file of this machine's database."""
    return state_directory() / FILE


def open_database(url: str | None = None, file: Path | None = None) -> Database:
    """Open a database and bring its tables up to date.

    Args:
        url: PostgreSQL's; None: SQLite in a file.
        file: SQLite's; None: this machine's.

    Raises:
        UsageError: The URL is none of PostgreSQL's.
        DatabaseError: It cannot be opened, or a newer version of this service has changed its tables.
    """
    database: Database
    if url:
        from service.usage.postgresql import PostgresqlDatabase  # noqa: PLC0415 - takes 25 MB; only where configured

        database = PostgresqlDatabase(url)
    else:
        database = SqliteDatabase(file or local_file())
    try:
        migrate(database)
    except BaseException:
        database.close()
        raise
    return database


def database_opener(url: str | None) -> Callable[[], Database]:
    """Return what opens a database; a wrong URL is refused now.

    Raises:
        UsageError: The URL is none of PostgreSQL's.
    """
    if url:
        from service.usage.postgresql import check_url  # noqa: PLC0415 - only where configured

        check_url(url)
    return lambda: open_database(url)


class SqliteDatabase:
    """A file; several processes may use it at the same time.

    Args:
        file: Where it is; it and its directory are made where they are missing.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _make_private(file)
            self._connection = sqlite3.connect(file, _BUSY_S, isolation_level=None, check_same_thread=False)
            self._inode = file.stat().st_ino
            self._connection.execute("PRAGMA journal_mode = WAL")  # a reader and the writer do not wait for each other
            self._connection.execute("PRAGMA synchronous = NORMAL")  # no commit waits for the disk
            self._connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        except (OSError, sqlite3.Error) as error:
            raise self._error(error) from error

    def write(self, *statements: Statement) -> None:
        """Run statements in one transaction."""
        try:
            self._check_file()
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                for sql, rows in statements:
                    if rows and isinstance(rows[0], tuple):
                        self._insert(sql, rows)
                    else:
                        self._connection.executemany(sql, rows)
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise
        except sqlite3.IntegrityError as error:
            raise DuplicateRowError(f"The database {self._file} has this row already: {error}.") from error
        except (OSError, sqlite3.Error) as error:
            raise self._error(error) from error

    def _insert(self, sql: str, rows: Sequence[Parameters]) -> None:
        """Insert many rows with each call of SQLite: a call lets the event loop's thread in, and waits for it."""
        one, many = _positional(sql)
        whole = len(rows) - len(rows) % _AT_ONCE
        for begin in range(0, whole, _AT_ONCE):
            self._connection.execute(many, [*chain.from_iterable(rows[begin : begin + _AT_ONCE])])
        self._connection.executemany(one, rows[whole:])

    def read(self, sql: str, **parameters: Any) -> list[Row]:
        """Return the rows of a query."""
        try:
            return self._connection.execute(sql, parameters).fetchall()
        except sqlite3.Error as error:
            raise self._error(error) from error

    def has_table(self, name: str) -> bool:
        """Tell whether a table is there."""
        return bool(self.read("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = :name", name=name))

    def close(self) -> None:
        """Close it."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()

    def _check_file(self) -> None:
        """Refuse to write to a file that was removed or replaced: nobody would ever read it.

        Raises:
            OSError: It was.
        """
        if self._file.stat().st_ino != self._inode:
            raise FileNotFoundError("it was replaced by another file")

    def _error(self, error: Exception) -> DatabaseError:
        return DatabaseError(
            f"The database {self._file} cannot be used: {error}.",
            hint="Give this user access to it and room on its disk; XDG_STATE_HOME names another directory.",
        )


@lru_cache(32)
def _positional(sql: str) -> tuple[str, str]:
    """Return an INSERT for one row, and for many."""
    one = PARAMETER.sub("?", sql)
    head, values, row = one.partition("VALUES ")
    return one, head + values + ", ".join([row] * _AT_ONCE)


def _make_private(file: Path) -> None:
    """Make a missing file, which will hold digests of keys.

    One that is there is not opened: closing it would drop the locks that SQLite has on it in this process, and another
    process would then remove the write-ahead log under it.
    """
    with contextlib.suppress(FileExistsError):
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))


def migrate(database: Database, migrations: Sequence[Sequence[str]] = MIGRATIONS) -> None:
    """Bring the tables up to date; each migration is one transaction.

    Raises:
        DatabaseError: The tables are those of a newer version.
    """
    while (version := _version(database)) < len(migrations):
        if not version:
            with contextlib.suppress(DuplicateRowError):  # PostgreSQL, where another process does the same
                database.write(("CREATE TABLE IF NOT EXISTS schema_version (version BIGINT PRIMARY KEY)", [{}]))
        done: Statement = ("INSERT INTO schema_version VALUES (:version)", [{"version": version + 1}])
        with contextlib.suppress(DuplicateRowError):  # another process was faster: it goes on from there
            database.write(done, *((sql, [{}]) for sql in migrations[version]))
    if version > len(migrations):
        raise UsageError(
            f"The database has version {version} of its tables, and this release knows {len(migrations)}.",
            hint="Install the release of vllm-service that wrote it, or a newer one.",
        )


def _version(database: Database) -> int:
    if not database.has_table("schema_version"):
        return 0
    found: int = database.read("SELECT coalesce(max(version), 0) FROM schema_version")[0][0]
    return found
