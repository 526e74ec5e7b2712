"""What people and spreadsheets see of usage. To stdout."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime

from rich.text import Text

from service.boots.groups import printable, shortened
from service.cli.terminal import print_json, print_table, results_console
from service.usage import report
from service.usage.database import Database
from service.usage.report import By, UsageRow, total

_HEADERS = ("requests", "errors", "tokens in", "cached", "tokens out", "seconds", "held s", "cost $", "owed $")


def print_usage(
    database: Database, by: By, since: datetime | None, interval_s: float, *, as_json: bool, as_csv: bool
) -> None:
    """Print the rows of callers, then those of the operator, as a table with their sum, as JSON, or as CSV.

    Args:
        database: Where they are.
        by: What a row is.
        since: From when on; None: from the beginning.
        interval_s: How much of its last requests a gateway that is killed loses at most.
        as_json: Print an object with the rows, and with sentences about what is missing.
        as_csv: Print a line of names, and a line a row.
    """
    rows = [*report.usage(database, by, since), *report.operator_rows(database, since)]
    notes = _notes(report.lost(database), report.unclosed_writers(database, time.time(), since), interval_s)
    if as_json:
        print_json({"by": by, "rows": [row.as_object() for row in rows], "notes": notes})
        return
    if as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        names = [field.name for field in fields(UsageRow)]
        writer.writerow([by, *names[1:]])
        writer.writerows([_safe(row.name), *(getattr(row, name) for name in names[1:])] for row in rows)
        return
    console = results_console()
    if rows:
        print_table((by, *_HEADERS), map(_cells, [*rows, total(rows)]), right=_HEADERS)
    else:
        console.print("No requests are recorded yet.")
    for note in notes:
        console.print(note, markup=False)


def _safe(name: str) -> str:
    """Return a name that no spreadsheet takes for a formula."""
    return f"'{name}" if name[:1] in {"=", "+", "-", "@"} and name != "-" else name


def _cells(row: UsageRow) -> list[Text | str]:
    counts = (row.requests, row.errors, row.tokens_in, row.tokens_cached, row.tokens_out)
    return [
        Text(shortened(printable(row.name), 30)),
        *(str(count) for count in counts),
        f"{row.seconds:.1f}",
        f"{row.held_s:.1f}",
        f"{row.cost:.4f}",
        f"{row.dollars:.4f}",
    ]


def _notes(lost: int, killed: Sequence[tuple[str, float]], interval_s: float) -> list[str]:
    """Return sentences about requests that the ledger does not have."""
    notes = [f"{lost} records of requests are lost: they could not be written in time."] if lost else []
    for name, alive_at in killed:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(alive_at))
        notes.append(
            f"The gateway {printable(name)} ended at about {at} UTC without closing the ledger: up to {interval_s:g} s "
            "of its last requests are not in it."
        )
    return notes
