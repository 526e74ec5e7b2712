"""Writes figures of a report for people, with three digits, all of those before the point, or whole."""

from __future__ import annotations


def seconds(value: float) -> str:
    """Return a time with its unit: `4.21 ms`, `1.30 s`, `125 s`."""
    return f"{rate(value * 1000)} ms" if value < 0.9995 else f"{rate(value)} s"


def of_metric(name: str, value: float) -> str:
    """Return a figure of a report's metric, by its unit."""
    return seconds(value) if name.endswith("_s") and not name.endswith("_per_s") else rate(value)


def rate(value: float) -> str:
    """Return a rate or a count: `0.42`, `31.5`, `7`, `1,240`."""
    if value >= 99.95 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
