"""The figures of a measurement, from what was measured of each request: rates, percentiles, errors, and what is drawn.

A report is plain JSON: the terminal, `--json` and the page show the same one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.errors import ServiceError

METRICS = {  # name in the report -> title; of a rate, the percentiles are what that share of requests reaches
    "ttft_s": "time to first token",
    "inter_token_s": "inter-token",
    "end_to_end_s": "end to end",
    "tokens_per_s": "tokens/s of a request",
}
PERCENTILES = (50, 90, 95, 99)
_BINS, _STEPS = 30, 60  # of a histogram; of the course over time


@dataclass(frozen=True)
class RequestRecord:
    """What was measured of one request.

    Attributes:
        start_s: When it was sent, on a clock that all records share.
        ttft_s: From there to the first chunk of its stream.
        gaps_s: Between its chunks.
        latency_s: From `start_s` to the last chunk, or to its error.
        error: Empty where it was answered whole.
    """

    start_s: float
    ttft_s: float = 0.0
    gaps_s: Sequence[float] = ()
    latency_s: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    error: str = ""


def build(records: Sequence[RequestRecord], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report of a measurement.

    Args:
        records: Of every request.
        facts: What was measured and how: `tool`, `url`, `model`, and `load` as a phrase.

    Raises:
        ServiceError: There is no record.
    """
    if not records:
        raise ServiceError("No request ended while it was measured.", hint="Measure longer.")
    begin, end = min(one.start_s for one in records), max(one.start_s + one.latency_s for one in records)
    seconds = max(end - begin, 1e-9)
    done = [one for one in records if not one.error]
    tokens_in, tokens_out = sum(one.input_tokens for one in done), sum(one.output_tokens for one in done)
    values = {
        "ttft_s": sorted(one.ttft_s for one in done),
        "inter_token_s": sorted(gap for one in done for gap in one.gaps_s),
        "end_to_end_s": sorted(one.latency_s for one in done),
        "tokens_per_s": sorted((one.output_tokens / one.latency_s for one in done if one.latency_s), reverse=True),
    }
    errors = Counter(one.error for one in records if one.error)
    return {
        **facts,
        "duration_s": round(seconds, 3),
        "requests": {
            "answered": len(done),
            "failed": len(records) - len(done),
            "answered_per_s": round(len(done) / seconds, 3),
        },
        "tokens": {
            "input": tokens_in,
            "output": tokens_out,
            "input_per_s": round(tokens_in / seconds, 1),
            "output_per_s": round(tokens_out / seconds, 1),
        },
        **{name: _summary(found) if found else None for name, found in values.items()},
        "errors": [{"error": error, "count": count} for error, count in errors.most_common()],
        "histograms": {name: _histogram(sorted(found)) for name, found in values.items() if found},
        "over_time": _over_time(done, begin, seconds),
    }


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return a percentile of values from best to worst, between the two nearest where it falls there, as NumPy does."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _summary(ordered: Sequence[float]) -> dict[str, float]:
    found = {"mean": sum(ordered) / len(ordered)}
    found |= {f"p{percent}": percentile(ordered, percent) for percent in PERCENTILES}
    found["worst"] = ordered[-1]
    return {name: round(value, 6) for name, value in found.items()}


def _histogram(ordered: Sequence[float]) -> dict[str, Any]:
    """Return counts between zero and the 99th percentile; what is above that is counted in the last bin."""
    top = percentile(ordered, 99) or ordered[-1] or 1e-9
    counts = [0] * _BINS
    for value in ordered:
        counts[min(int(value / top * _BINS), _BINS - 1)] += 1
    return {"to": top, "counts": counts}


def _over_time(done: Sequence[RequestRecord], begin: float, seconds: float) -> dict[str, Any]:
    """Return, for each step of the duration, chunks per second and requests in flight (mean)."""
    step = seconds / _STEPS
    chunks, busy = [0.0] * _STEPS, [0.0] * _STEPS
    for one in done:
        for at in _arrivals(one):
            chunks[min(int((at - begin) / step), _STEPS - 1)] += 1
        first, last = one.start_s - begin, one.start_s + one.latency_s - begin
        for place in range(int(first / step), min(int(last / step), _STEPS - 1) + 1):
            busy[place] += max(min(last, (place + 1) * step) - max(first, place * step), 0.0)
    return {
        "step_s": round(step, 6),
        "chunks_per_s": [round(count / step, 2) for count in chunks],
        "in_flight": [round(time / step, 2) for time in busy],
    }


def _arrivals(one: RequestRecord) -> Iterator[float]:
    at = one.start_s + one.ttft_s
    yield at
    for gap in one.gaps_s:
        at += gap
        yield at
