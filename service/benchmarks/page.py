"""Draws a report as a page: figures, percentiles, charts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from service.benchmarks.report import METRICS, PERCENTILES
from service.benchmarks.units import of_metric, rate, seconds
from service.html_page import document, figure

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 480, 190, 58, 14, 24  # of a chart, in its own units
_STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 12px;
  margin-bottom: 12px; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font: 14px system-ui, sans-serif; }
.grid { stroke: var(--line); } .bar { fill: var(--mark); }
.area { fill: var(--mark); opacity: .18; } .course { fill: none; stroke: var(--mark); stroke-width: 2; }
.second .area { fill: var(--mark-2); } .second .course { stroke: var(--mark-2); }
.mean { stroke: var(--text); stroke-dasharray: 3 3; }
@media (max-width: 560px) { svg text { font-size: 17px; } }
"""


def render(report: dict[str, Any]) -> str:
    """Return the page of a report."""
    title = f"{report['model']} at {report['url']}"
    spread = [_histogram(name, report) for name in METRICS if name in report["histograms"]]
    courses = [
        _course(report, "chunks_per_s", "Stream chunks/s over time", "second"),
        _course(report, "in_flight", "Requests in flight over time", ""),
    ]
    return document(
        title,
        _STYLE,
        f"<p>{escape(report['load'])}; {seconds(report['duration_s'])} in all. "
        f"{escape(report['tool'])}, {escape(report['ended_at'])}.</p>",
        f'<div class="figures">{"".join(_figures(report))}</div>',
        f'<section class="wide"><h2>Percentiles</h2>{_percentiles(report)}</section>',
        _errors(report),
        f'<div class="charts">{"".join(spread)}</div><div class="charts">{"".join(courses)}</div>',
    )


def _figures(report: dict[str, Any]) -> Iterator[str]:
    requests, tokens = report["requests"], report["tokens"]
    yield figure(f"{requests['answered']:,}", "requests answered")
    yield figure(f"{requests['failed']:,}", "requests failed", bad=bool(requests["failed"]))
    yield figure(rate(requests["answered_per_s"]), "requests/s")
    yield figure(rate(tokens["output_per_s"]), "output tokens/s")
    yield figure(rate(tokens["input_per_s"]), "input tokens/s")
    if report["ttft_s"]:
        yield figure(seconds(report["ttft_s"]["p50"]), "to first token, median")


def _percentiles(report: dict[str, Any]) -> str:
    columns = {name: title for name, title in METRICS.items() if report[name]}
    head = "".join(f"<th>{title}</th>" for title in columns.values())
    rows = "".join(
        f"<tr><td>{row}</td>{''.join(f'<td>{of_metric(name, report[name][row])}</td>' for name in columns)}</tr>"
        for row in ("mean", *(f"p{percent}" for percent in PERCENTILES), "worst")
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _errors(report: dict[str, Any]) -> str:
    if not report["errors"]:
        return ""
    rows = "".join(f"<tr><td>{escape(one['error'])}</td><td>{one['count']:,}</td></tr>" for one in report["errors"])
    return f'<section class="wide bad"><h2>Errors</h2><table>{rows}</table></section>'


def _histogram(name: str, report: dict[str, Any]) -> str:
    found, median = report["histograms"][name], report[name]["p50"]
    counts, top = found["counts"], found["to"]
    width = (_WIDTH - _LEFT) / len(counts)
    high = max(counts)
    bars = "".join(
        f'<rect class="bar" x="{_LEFT + place * width + 0.5:.1f}" y="{_y(count, high):.1f}" '
        f'width="{width - 1:.1f}" height="{_HEIGHT - _BOTTOM - _y(count, high):.1f}"/>'
        for place, count in enumerate(counts)
        if count
    )
    at = _LEFT + min(median / top, 1.0) * (_WIDTH - _LEFT)
    mark = f'<line class="mean" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
    last = of_metric(name, top * (len(counts) - 1) / len(counts))
    note = f"Median {of_metric(name, median)}; the last bar holds all above {last}."
    return _chart(
        METRICS[name].capitalize(), note, high, ("0", of_metric(name, top / 2), of_metric(name, top)), bars + mark
    )


def _course(report: dict[str, Any], name: str, title: str, kind: str) -> str:
    values: Sequence[float] = report["over_time"][name]
    high, duration = max(values) or 1.0, report["duration_s"]
    step = (_WIDTH - _LEFT) / max(len(values) - 1, 1)
    points = " ".join(f"{_LEFT + place * step:.1f},{_y(value, high):.1f}" for place, value in enumerate(values))
    floor = _HEIGHT - _BOTTOM
    drawn = (
        f'<polygon class="area" points="{_LEFT},{floor} {points} {_WIDTH},{floor}"/>'
        f'<polyline class="course" points="{points}"/>'
    )
    mean = rate(sum(values) / len(values))
    return _chart(title, f"Mean {mean}.", high, ("0", seconds(duration / 2), seconds(duration)), drawn, kind=kind)


def _chart(title: str, note: str, high: float, ticks: tuple[str, str, str], drawn: str, *, kind: str = "") -> str:
    floor = _HEIGHT - _BOTTOM
    heights = [f"{_y(share, 1):.1f}" for share in (0, 0.5, 1)]
    grid = "".join(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH}" y1="{y}" y2="{y}"/>' for y in heights)
    middle = (_LEFT + _WIDTH) / 2
    labels = (
        f'<text x="{_LEFT - 6}" y="{_TOP + 5}" text-anchor="end">{rate(high)}</text>'
        f'<text x="{_LEFT - 6}" y="{floor}" text-anchor="end">0</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 5}">{ticks[0]}</text>'
        f'<text x="{middle:.0f}" y="{_HEIGHT - 5}" text-anchor="middle">{ticks[1]}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT - 5}" text-anchor="end">{ticks[2]}</text>'
    )
    return (
        f'<section class="{kind}"><h2>{title}</h2>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}. {note}">{grid}{drawn}{labels}</svg>'
        f"<p>{note}</p></section>"
    )


def _y(value: float, high: float) -> float:
    return _TOP + (_HEIGHT - _BOTTOM - _TOP) * (1 - value / high)
