"""The picture of boots in a file: an image, or a page that needs no network, with the records below the picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from service.boots.groups import Group, groups, printable
from service.boots.records import BootRecord, by_time, write_whole
from service.boots.timeline import drawn
from service.errors import ServiceError

_BOOTS = (
    "id", "when (UTC)", "model", "revision", "GPU", "strategy", "restored", "fast boot", "outcome", "seconds",
    "once, in the snapshot", "phases: seconds", "GB read", "versions", "reason",
)  # fmt: skip
_KINDS = ("model, GPU", "boots", "ready", "median s", "spread s", "cold", "failed")
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta name="color-scheme" content="light dark"/>
<title>Boots</title>
<style>
body {{ font: 14px/1.45 system-ui, sans-serif; margin: 1.5rem; }}
figure {{ background: white; margin: 0 0 1.5rem; max-width: 1300px; border-radius: 6px; }}
figure svg {{ width: 100%; height: auto; display: block; }}
div {{ overflow-x: auto; margin-bottom: 1.5rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; font-weight: 600; padding: .3rem 0; }}
th, td {{ text-align: left; vertical-align: top; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #8885; }}
td.number {{ text-align: right; }}
td.wide {{ min-width: 17rem; }}
</style>
</head>
<body>
<figure role="img" aria-label="Seconds from asking for a replica until it was ready; the tables below say the same.">
{picture}
</figure>
<div>{kinds}</div>
<div>{boots}</div>
</body>
</html>
"""


def png(records: Sequence[BootRecord], file: Path) -> None:
    """Write the picture of the newest boots.

    Raises:
        ServiceError: The file cannot be written; nothing of it is left then.
    """
    _write(file, drawn(records, "png"))


def html(records: Sequence[BootRecord], file: Path) -> None:
    """Write a page with the picture of the newest boots, what is typical of each kind, and all records, newest first.

    Raises:
        ServiceError: As `png`.
    """
    svg = drawn(records, "svg").decode()
    page = _PAGE.format(
        picture=svg[svg.index("<svg") :],
        kinds=_table("What is typical: boots that got ready undisturbed", _KINDS, map(_kind, groups(records))),
        boots=_table("All boots, newest first", _BOOTS, map(_boot, reversed(by_time(records)))),
    )
    _write(file, page.encode())


def _write(file: Path, data: bytes) -> None:
    try:
        write_whole(file, data)
    except (OSError, ValueError) as error:  # a name without a last part is a ValueError
        raise ServiceError(
            f"'{file}' cannot be written: {getattr(error, 'strerror', None) or error}. "
            "Name a file in a directory that exists and is yours, such as './boots.html' or './boots.png'."
        ) from error


def _table(caption: str, headers: Iterable[str], rows: Iterable[Iterable[str | float | None]]) -> str:
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in headers)
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return (
        f"<table>\n<caption>{escape(caption)}</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    )


def _cell(value: str | float | None) -> str:
    if isinstance(value, float):
        return f'<td class="number">{value:.1f}</td>'
    if isinstance(value, int):
        return f'<td class="number">{value}</td>'
    text = printable(value or "")
    return f'<td class="wide">{escape(text)}</td>' if len(text) > 40 else f"<td>{escape(text)}</td>"


def _kind(group: Group) -> list[str | float | None]:
    ready = group.ready_seconds
    spread = f"{min(ready):.1f} to {max(ready):.1f}" if len(ready) > 1 else None
    outcomes = (group.count("cold"), group.count("failed"))
    return [group.subject, group.kind, len(ready), group.median, spread, *outcomes]


def _boot(record: BootRecord) -> list[str | float | None]:
    phases = ", ".join(f"{s.name} {s.start:.1f} to {s.end:.1f}" for s in sorted(record.phases, key=lambda s: s.start))
    return [
        record.id,
        f"{record.when:%Y-%m-%d %H:%M:%S}",
        record.model,
        (record.revision or "")[:12],
        record.gpu,
        record.strategy,
        "yes" if record.restored else "no",
        "yes" if record.fast_boot else "no",
        record.outcome,
        record.seconds,
        record.snapshot_seconds or None,
        phases,
        None if record.bytes_read is None else record.bytes_read / 1e9,
        ", ".join(f"{name} {version}" for name, version in record.versions.items()),
        record.reason,
    ]
