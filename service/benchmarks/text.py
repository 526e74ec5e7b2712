"""Writes a report as lines for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from service.benchmarks.report import METRICS, PERCENTILES
from service.benchmarks.units import of_metric, rate, seconds

_COLUMNS = ("mean", *(f"p{percent}" for percent in PERCENTILES), "worst")
_TITLE, _CELL, _ERROR = 21, 9, 69


def lines(report: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a report."""
    requests, tokens = report["requests"], report["tokens"]
    yield f"{report['model']} at {report['url']}"
    yield f"{report['load']}"
    yield f"{report['tool']}"
    yield ""
    yield f"{'':<{_TITLE}}{''.join(f'{column:>{_CELL}}' for column in _COLUMNS)}"
    for name, title in METRICS.items():
        if found := report[name]:
            yield f"{title:<{_TITLE}}{''.join(f'{of_metric(name, found[column]):>{_CELL}}' for column in _COLUMNS)}"
    yield ""
    yield (
        f"{requests['answered']:,} answered, {requests['failed']:,} failed in {seconds(report['duration_s'])}: "
        f"{rate(requests['answered_per_s'])} requests/s"
    )
    yield f"output: {rate(tokens['output_per_s'])} tokens/s, {tokens['output']:,} in all"
    yield f"input:  {rate(tokens['input_per_s'])} tokens/s, {tokens['input']:,} in all"
    for one in report["errors"]:
        yield f"{one['count']:>8,} x {one['error'][:_ERROR]}"
