"""PostgreSQL, by SQLAlchemy Core and asyncpg. Imported only where `SERVICE_DATABASE_URL` is set."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

import sqlalchemy
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine

from service.errors import UsageError
from service.settings import DATABASE_URL
from service.usage.database import PARAMETER, DatabaseError, DuplicateRowError, Row, Statement

_ANSWER_S = 10.0
_SCHEMES = ("postgresql", "postgres", "postgresql+asyncpg")
_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_HINT = "Write postgresql://<user>:<password>@<host>/<database>."
_PORTS = range(1, 65536)
_T = TypeVar("_T")


class PostgresqlDatabase:
    """A database of a server; it is connected to again after it was gone.

    Args:
        url: `postgresql://<user>:<password>@<host>/<database>`; no error shows it.

    Raises:
        UsageError: It is no such URL.
    """

    def __init__(self, url: str) -> None:
        parsed = check_url(url)
        self._place = f"{parsed.host or 'localhost'}/{parsed.database}"
        self._engine = create_async_engine(
            parsed.set(drivername="postgresql+asyncpg", query={}),
            pool_size=1,
            max_overflow=0,
            pool_pre_ping=True,
            hide_parameters=True,
            connect_args={"timeout": _ANSWER_S, "command_timeout": _ANSWER_S, **_ssl(parsed)},
        )
        self._runner = asyncio.Runner()

    def write(self, *statements: Statement) -> None:
        """Run statements in one transaction."""

        async def run() -> None:
            async with self._engine.begin() as connection:
                for sql, rows in statements:
                    names = PARAMETER.findall(sql)
                    named = [dict(zip(names, row, strict=True) if isinstance(row, tuple) else row) for row in rows]
                    await connection.execute(sqlalchemy.text(sql), named)

        self._run(run())

    def read(self, sql: str, **parameters: Any) -> list[Row]:
        """Return the rows of a query."""

        async def run() -> list[Row]:
            async with self._engine.connect() as connection:
                return [tuple(row) for row in await connection.execute(sqlalchemy.text(sql), parameters)]

        return self._run(run())

    def has_table(self, name: str) -> bool:
        """Tell whether a table is there."""
        return bool(self.read("SELECT 1 WHERE to_regclass(:name) IS NOT NULL", name=name))

    def close(self) -> None:
        """Close it."""
        with contextlib.suppress(Exception):
            self._runner.run(self._engine.dispose())
        self._runner.close()

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        try:
            return self._runner.run(work)
        except IntegrityError as error:
            raise DuplicateRowError(f"PostgreSQL at {self._place} has this row already.") from error
        except (SQLAlchemyError, OSError, TimeoutError, ValueError) as error:  # ValueError: asyncpg's own
            reason = str(getattr(error, "orig", None) or error).partition("\n")[0] or type(error).__name__
            raise DatabaseError(
                f"PostgreSQL at {self._place} cannot be used: {reason}.",
                hint="Check that it runs and that SERVICE_DATABASE_URL has its host, user, password and database.",
            ) from error


def check_url(url: str) -> sqlalchemy.URL:
    """Return the URL, parsed.

    Raises:
        UsageError: It is none of a PostgreSQL database, or has what the client does not know. The message shows neither
            user nor password.
    """
    if url.count("@") > 1:  # the parser would take a part of the password for the host or the database
        raise _wrong("has more than one @", "Write @ and / of a password as %40 and %2F.")
    try:
        parsed = sqlalchemy.make_url(url)
    except ArgumentError:
        parsed = None
    except ValueError:  # its text has what stands there
        raise _wrong("has no number as its port", _HINT) from None
    if parsed is None or parsed.drivername not in _SCHEMES or not parsed.database:
        raise _wrong("is not the URL of a PostgreSQL database", _HINT)
    if parsed.port is not None and parsed.port not in _PORTS:
        raise _wrong(f"has the port {parsed.port}, not one from 1 to 65535", _HINT)
    if not _is_host(parsed.host or "localhost"):
        raise _wrong(f"has '{parsed.host}' in place of the name or address of one host", _HINT)
    if unknown := sorted(parsed.query.keys() - {"sslmode", "ssl"}):
        raise _wrong(f"has '{unknown[0]}' after its ?, which is not known", "Leave it out; sslmode may stand there.")
    if wrong := [mode for mode in _ssl(parsed).values() if mode not in _SSL_MODES]:
        raise _wrong(f"has sslmode={wrong[0]}", f"Write one of {', '.join(_SSL_MODES)}.")
    return parsed


def _ssl(url: sqlalchemy.URL) -> dict[str, Any]:
    """Return asyncpg's argument for what libpq calls `sslmode`; their words are the same."""
    mode = url.query.get("sslmode") or url.query.get("ssl")
    return {"ssl": mode} if mode else {}


def _is_host(name: str) -> bool:
    try:
        return "," not in name and bool(name.encode("idna"))
    except UnicodeError:
        return False


def _wrong(what: str, hint: str) -> UsageError:
    return UsageError(f"{DATABASE_URL} {what}.", hint=hint)
