"""What people see of boots: a line a boot with its phases below, and what is typical of each kind. To stdout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from service.boots import page
from service.boots.groups import Group, groups, printable, shortened
from service.boots.records import BootRecord
from service.cli.terminal import TABLE_WIDTH, print_json, print_table, results_console
from service.errors import ServiceError

_MODEL_WIDTH = 38  # what the other columns leave of the table's width
_HEADERS = ("id", "when (UTC)", "model", "GPU", "strategy", "restored", "outcome", "seconds")
_GROUP_HEADERS = ("model", "GPU", "fast boot", "boots", "ready", "median s", "spread s", "cold", "failed")
_STYLES = {"ready": "green", "cold": "yellow"}


def print_boots(records: Sequence[BootRecord], source: str, as_json: bool) -> None:
    """Print the records as tables, or as a JSON array with one object a record.

    Args:
        records: Oldest first.
        source: Where they would come from, a sentence for when there are none.
        as_json: For programs.
    """
    if as_json:
        print_json([record.as_object() for record in records])
        return
    console = results_console()
    if not records:
        console.print(source, markup=False)
        return
    rows = [_cells(record) for record in records]
    widths = [max(len(cell) for cell in column) for column in zip(_HEADERS, *rows, strict=True)]
    console.print(Text(_aligned(_HEADERS, widths), style="bold"))
    for record, row in zip(records, rows, strict=True):
        console.print(Text(_aligned(row, widths), style=_STYLES.get(record.outcome, "red")))
        for line in _details(record):
            console.print(Text(line, style="dim"))
    console.print()
    print_table(_GROUP_HEADERS, map(_group_cells, groups(records)), right=_GROUP_HEADERS[4:])
    console.print("Medians and spreads are of boots that got ready undisturbed.")


def write_page(records: Sequence[BootRecord], source: str, file: Path) -> None:
    """Write the page of boots that are printed already.

    Args:
        records: Oldest first.
        source: Whose boots they are.
        file: Replaced where it exists.

    Raises:
        ServiceError: It cannot be written.
    """
    try:
        file.write_text(page.render(records, source), encoding="utf-8")
    except OSError as error:
        raise ServiceError(
            f"--html {file} cannot be written: {error.strerror}.", hint="The table above is complete."
        ) from error


def _cells(record: BootRecord) -> list[str]:
    return [
        printable(record.id),
        f"{record.when:%Y-%m-%d %H:%M}",
        shortened(record.model, _MODEL_WIDTH),
        shortened(record.gpu, 9),
        shortened(record.strategy, 8),
        "yes" if record.restored else "no",
        shortened(record.outcome, 8),
        f"{record.seconds:.1f}",
    ]


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    *texts, number = zip(cells, widths, strict=True)
    return "  ".join([*(text.ljust(width) for text, width in texts), number[0].rjust(number[1])])


def _details(record: BootRecord) -> list[str]:
    """Return indented lines: the phases that were waited for, what the snapshot took, and what went wrong."""
    waited = [span for span in sorted(record.phases, key=lambda span: span.start) if span.end > 0]
    pieces = [f"{printable(span.name)} {max(span.end - max(span.start, 0.0), 0.0):.1f}" for span in waited]
    if record.snapshot_seconds >= 0.05:
        pieces.append(f"(+{record.snapshot_seconds:.1f} once, in the snapshot)")
    lines, line = [], ""
    for piece in pieces:
        if line and len(line) + len(piece) + 6 > TABLE_WIDTH:
            lines.append(line)
            line = ""
        line += f"{'  ' if line else ''}{piece}"
    return [f"    {text}" for text in (*lines, line, printable(record.reason or "")) if text]


def _group_cells(group: Group) -> list[Text | str]:
    spread = group.spread
    return [
        Text(shortened(group.model, 34)),
        Text(shortened(group.gpu, 9)),
        "yes" if group.fast_boot else "no",
        Text(shortened(group.kind, 20)),
        str(len(group.ready_seconds)),
        "-" if group.median is None else f"{group.median:.1f}",
        f"{spread[0]:.1f} to {spread[1]:.1f}" if spread else "-",
        *(str(group.count(outcome)) for outcome in ("cold", "failed")),
    ]
