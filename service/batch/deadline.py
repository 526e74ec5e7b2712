"""Whether a batch ends within its completion window, by the rate that is measured or was measured last."""

from __future__ import annotations

from pathlib import Path

import msgspec

from service.batch.lines import LINE_LIMIT, named_model
from service.batch.store import Batch, BatchError, Store

AT_RISK = "deadline_at_risk"


class _First(msgspec.Struct):
    body: msgspec.Raw


_FIRST = msgspec.json.Decoder(_First)  # made before there are threads: see store.py


def warnings(batch: Batch, lines: int, lines_per_s: float | None, now: float) -> list[BatchError]:
    """Return the errors of a batch whose lines, at a rate, take longer than it has; none where no rate is known."""
    if not lines_per_s or lines <= 0 or now + lines / lines_per_s <= batch.expires_at:
        return []
    takes, left = lines / lines_per_s, max(0.0, batch.expires_at - now)
    message = (
        f"{lines} lines take about {takes:.0f} s at {lines_per_s:.3g} lines/s, and {left:.0f} s are left: what has no "
        "answer then expires. Cancel the batch and create it with a longer completion_window, or with fewer lines."
    )
    return [BatchError(code=AT_RISK, message=message, param="completion_window")]


def rate_name(batch: Batch, content: Path) -> str:
    """Return what the rate of a batch is kept under: its endpoint, and the model of its first line. Blocks."""
    try:
        with content.open("rb") as file:
            model = named_model(_FIRST.decode(file.readline(LINE_LIMIT)).body)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        model = ""
    return f"{batch.endpoint} {model[:100]}"


def last_rate(store: Store, batch: Batch, content: Path) -> float | None:
    """Return the rate of the last such batch; None: there was none. Blocks."""
    return store.rates().get(rate_name(batch, content))
