"""Traces of requests: OpenTelemetry's packages are imported only where its variables name a receiver.

`spans.py` makes the spans; without a receiver a request's log has no trace, and nothing of this costs anything.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from service import otel

if TYPE_CHECKING:
    from service.gateway.metrics import RequestLog
    from service.gateway.pool import Pool
    from service.gateway.spans import Tracing

_log = logging.getLogger(__name__)


def from_environ(environ: Mapping[str, str]) -> Tracing | None:
    """Return what exports traces; None: no receiver is named, or a warning says why it cannot, and all else goes on."""
    if reason := otel.why_off(environ):
        _log.warning("No traces are exported: %s", reason)
    if not (used := otel.variables(environ)):
        return None
    try:
        spans = importlib.import_module("service.gateway.spans")
    except ImportError as error:
        _log.warning(
            "The gateway exports no traces, because the package of '%s' is missing. Install it: "
            "pip install opentelemetry-exporter-otlp-proto-http, or in a clone "
            ".venv/bin/pip install --no-deps -r service/pins/%s.",
            error.name,
            otel.LOCK,
        )
        return None
    found: Tracing = spans.Tracing.from_variables(used)
    return found


def waiting(log: RequestLog, pool: Pool) -> AbstractContextManager[None]:
    """Trace that a request waits for a pool, while the context lasts."""
    return log.trace.waiting(pool) if log.trace else nullcontext()
