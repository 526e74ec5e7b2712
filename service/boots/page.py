"""Draws boots as a page: what is typical of each kind, and a timeline of every boot, as the console has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby

from service.boots.groups import Group, groups, kind, printable
from service.boots.records import BootRecord, Span
from service.html_page import document, figure

# Names and colours of the console: service/console/charts.js and console.css
PHASES = (
    *("weights", "caches", "restore", "import", "load", "compile"),
    *("graphs", "warm-up", "sleep", "wake", "canary", "ready"),
)
COLOURS = (
    *("#2563eb", "#0891b2", "#7c3aed", "#d97706", "#16a34a", "#db2777"),
    *("#65a30d", "#0d9488", "#9333ea", "#e11d48", "#f59e0b", "#64748b"),
)
_HEADERS = ("ready", "median s", "spread s", "cold", "failed")
_STYLE = """
h2 { overflow-wrap: anywhere; } .scroll { overflow-x: auto; margin-bottom: 10px; } section { margin-bottom: 12px; }
svg { display: block; width: 100%; height: 16px; } .track { fill: var(--line); opacity: .5; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 0 0 8px; padding: 0; list-style: none; font-size: 13px;
  color: var(--soft); }
.legend i { display: inline-block; width: 11px; height: 11px; margin-right: 5px; border-radius: 2px; }
details { border-top: 1px solid var(--line); } summary { cursor: pointer; }
.boot, .phase { display: grid; grid-template-columns: 150px 150px 1fr 72px; gap: 2px 12px; align-items: center;
  padding: 5px 0; font-size: 14px; font-variant-numeric: tabular-nums; }
.boot > :last-child, .phase > :last-child { text-align: right; } .kind, time, .phase { color: var(--soft); }
.phase { padding: 1px 0; font-size: 13px; } .phase span:first-child { grid-column: span 2; text-align: right; }
.phase svg { height: 9px; }
.failed { color: var(--bad); } details p { padding-bottom: 5px; font-size: 13px; }
summary:focus-visible { outline: 2px solid var(--mark); outline-offset: 1px; border-radius: 4px; }
@media (max-width: 640px) {
  .scroll th, .scroll td { padding: 5px 2px; font-size: 12px; } .scroll td:first-child { padding-left: 0; }
  .boot { grid-template-columns: 1fr auto; } .boot svg { grid-column: 1 / -1; grid-row: 2; }
  .boot .kind { grid-column: 1; grid-row: 3; } .boot > :last-child { grid-column: 2; grid-row: 1; }
  .phase { grid-template-columns: 76px 1fr 62px; } .phase span:first-child { grid-column: 1; text-align: left; } }
""" + "".join(f".c{place} {{ fill: {one}; background: {one}; }}\n" for place, one in enumerate(COLOURS))


def render(records: Sequence[BootRecord], source: str) -> str:
    """Return the page of boots.

    Args:
        records: Oldest first.
        source: Whose boots they are, such as `this machine`.
    """
    found = groups(records)
    return document(
        f"Boots of {source}",
        _STYLE,
        f"<p>{_period(records)} Seconds count from the first line of the service's code that ran for a replica; what a "
        "memory snapshot holds was done before, once for all its replicas. A boot opens to its phases.</p>",
        f'<div class="figures">{"".join(_figures(records))}</div>',
        *(
            _section(subject, list(members), found)
            for subject, members in groupby(sorted(records, key=_subject), key=_subject)
        ),
    )


def _period(records: Sequence[BootRecord]) -> str:
    return f"From {_minute(records[0])} to {_minute(records[-1])} UTC." if records else "No boots are recorded."


def _minute(record: BootRecord) -> str:
    return f"{record.when:%Y-%m-%d %H:%M}"


def _figures(records: Sequence[BootRecord]) -> Iterator[str]:
    yield figure(f"{len(records):,}", "boots")
    for outcome, title in (
        ("ready", "ready"),
        ("cold", "cold, after a restore that failed"),
        ("failed", "failed"),
    ):
        count = sum(record.outcome == outcome for record in records)
        yield figure(f"{count:,}", title, bad=outcome == "failed" and bool(count))


def _subject(record: BootRecord) -> tuple[str, str]:
    return record.model, record.gpu


def _section(subject: tuple[str, str], records: list[BootRecord], found: list[Group]) -> str:
    """Return what a page has of one model on one GPU: the newest boot first, all at one scale."""
    model, gpu = (_text(part) for part in subject)
    length = max([0.1, *(record.seconds for record in records), *(s.end for r in records for s in r.phases)])
    names = {span.name for record in records for span in record.phases if not _is_in_snapshot(span)}
    legend = "".join(
        f'<li><i class="c{_colour(name)}"></i>{_text(name)}</li>'
        for name in sorted(names, key=lambda name: (_colour(name), name))
    )
    return (
        f"<section><h2>{model} on {gpu}</h2>{_typical([one for one in found if (one.model, one.gpu) == subject])}"
        f'<ul class="legend">{legend}</ul>{"".join(_boot(record, length) for record in reversed(records))}</section>'
    )


def _typical(found: list[Group]) -> str:
    head = "".join(f"<th>{title}</th>" for title in _HEADERS)
    rows = "".join(
        f"<tr><td>{_kind(group.kind)}{'' if group.fast_boot else ', without fast boot'}</td>"
        f"{''.join(f'<td>{cell}</td>' for cell in _cells(group))}</tr>"
        for group in found
    )
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _cells(group: Group) -> Iterator[str]:
    yield str(len(group.ready_seconds))
    yield "-" if group.median is None else f"{group.median:.1f}"
    yield f"{group.spread[0]:.1f} to {group.spread[1]:.1f}" if group.spread else "-"
    yield from (str(group.count(outcome)) for outcome in ("cold", "failed"))


def _boot(record: BootRecord, length: float) -> str:
    spans = sorted(record.phases, key=lambda span: (span.start, span.end))
    label = f"{record.outcome} after {_seconds(record.seconds)}"
    bars = "".join(_bar(span, length, title=True) for span in spans)
    outcome = "" if record.outcome == "ready" else f" {_text(record.outcome)}"
    reason = f'<p class="failed">{_text(record.reason)}</p>' if record.reason else ""
    return (
        f'<details><summary class="boot"><time datetime="{escape(record.when.isoformat())}">{_minute(record)}</time>'
        f'<span class="kind">{_kind(kind(record))}<b class="failed">{outcome}</b></span>{_svg(bars, _text(label))}'
        f"<span>{_seconds(record.seconds)}</span></summary>"
        f"{reason}{''.join(_phase(span, length) for span in spans)}{_facts(record)}</details>"
    )


def _phase(span: Span, length: float) -> str:
    where = "<span>in the snapshot</span>" if _is_in_snapshot(span) else _svg(_bar(span, length))
    return (
        f'<div class="phase"><span>{_text(span.name)}</span>{where}<span>{_seconds(span.end - span.start)}</span></div>'
    )


def _facts(record: BootRecord) -> str:
    versions = ", ".join(f"{_text(name)} {_text(version)}" for name, version in record.versions.items())
    read = f"{record.bytes_read / 1e9:,.1f} GB read; " if record.bytes_read else ""
    return f"<p>{_text(record.id)}; {read}{versions}</p>"


def _svg(bars: str, label: str = "") -> str:
    described = f'role="img" aria-label="{label}"' if label else 'aria-hidden="true"'
    return f'<svg {described}><rect class="track" width="100%" height="100%" rx="3"/>{bars}</svg>'


def _bar(span: Span, length: float, *, title: bool = False) -> str:
    """Return the part of a phase that a request waited for."""
    if _is_in_snapshot(span):
        return ""
    start = max(0.0, span.start)
    width = max(0.2, 100 * (span.end - start) / length)
    said = f"<title>{_text(span.name)}: {_seconds(span.end - start)}, from {_seconds(start)}</title>" if title else ""
    return (
        f'<rect class="c{_colour(span.name)}" x="{100 * start / length:.2f}%" width="{width:.2f}%" height="100%">'
        f"{said}</rect>"
    )


def _is_in_snapshot(span: Span) -> bool:
    return span.start < 0 and span.end <= 0


def _kind(name: str) -> str:
    return "no snapshot" if name == "off" else _text(name)


def _colour(name: str) -> int:
    place = PHASES.index(name) if name in PHASES else sum(map(ord, name))
    return place % len(COLOURS)


def _seconds(value: float) -> str:
    return f"{value:.1f} s"


def _text(text: str) -> str:
    return escape(printable(text))
