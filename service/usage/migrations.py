"""The tables, and how an older database gets them. The statements are valid in SQLite and in PostgreSQL.

A migration that a release had is never changed: another one follows it.
"""

from __future__ import annotations

# Times are seconds since 1970, by the clock of the machine that wrote them; an hour is a whole number of 3600 s.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE requests (
            writer TEXT NOT NULL, number BIGINT NOT NULL, at DOUBLE PRECISION NOT NULL, key TEXT NOT NULL,
            model TEXT NOT NULL, tokens_in BIGINT, tokens_cached BIGINT, tokens_out BIGINT,
            seconds DOUBLE PRECISION NOT NULL, held_s DOUBLE PRECISION NOT NULL, status BIGINT NOT NULL,
            replica TEXT, cost DOUBLE PRECISION, dollars DOUBLE PRECISION, PRIMARY KEY (writer, number))""",
        # What `usage` shows: sums of an hour, so that a million requests are as fast to read as a few.
        """CREATE TABLE hours (
            hour BIGINT NOT NULL, key TEXT NOT NULL, model TEXT NOT NULL, requests BIGINT NOT NULL,
            errors BIGINT NOT NULL, tokens_in BIGINT NOT NULL, tokens_cached BIGINT NOT NULL,
            tokens_out BIGINT NOT NULL, seconds DOUBLE PRECISION NOT NULL, held_s DOUBLE PRECISION NOT NULL,
            cost DOUBLE PRECISION NOT NULL, dollars DOUBLE PRECISION NOT NULL, PRIMARY KEY (hour, key, model))""",
        # The processes that write requests: one that was killed has no `closed_at`, and lost what it had not written.
        """CREATE TABLE writers (
            id TEXT PRIMARY KEY, started_at DOUBLE PRECISION NOT NULL, alive_at DOUBLE PRECISION NOT NULL,
            closed_at DOUBLE PRECISION, lost BIGINT NOT NULL)""",
        """CREATE TABLE replicas (
            id TEXT PRIMARY KEY, model TEXT NOT NULL, gpu TEXT NOT NULL, dollars_per_hour DOUBLE PRECISION,
            started_at DOUBLE PRECISION NOT NULL, ready_at DOUBLE PRECISION, alive_at DOUBLE PRECISION NOT NULL,
            ended_at DOUBLE PRECISION)""",
    ),
    (
        # One row for each change of a client's keys or limits; the newest one counts (service/usage/key_records.py).
        """CREATE TABLE api_keys (
            name TEXT NOT NULL, version BIGINT NOT NULL, at DOUBLE PRECISION NOT NULL, record TEXT NOT NULL,
            PRIMARY KEY (name, version))""",
    ),
    (
        # The writers whose rows came from files: a reader without these rows takes them again, and sums them again.
        "CREATE TABLE file_writers (id TEXT PRIMARY KEY)",
    ),
)
