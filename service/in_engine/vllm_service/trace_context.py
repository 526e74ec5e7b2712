"""The W3C trace context of a request, as the client sent it, and the log of OpenTelemetry's exporter.

Gateway and guard both use it. Standard library only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping

# of all headers of a name together; W3C asks for 512 of a tracestate, a traceparent has 55
MAX_BYTES = 512
_NAMES = (b"traceparent", b"tracestate")
_LOG_EVERY_S = 60.0


def of_request(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return the trace context among a request's headers; empty where it has none, or one that is out of bounds."""
    found: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        if name in _NAMES:
            found.setdefault(name, []).append(value)
    joined = {name: b",".join(values) for name, values in found.items()}
    if len(found.get(b"traceparent", ())) != 1 or len(joined[b"traceparent"]) > MAX_BYTES:
        return {}
    return {name.decode(): value.decode("latin-1") for name, value in joined.items() if len(value) <= MAX_BYTES}


def bounded(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return headers whose trace context is within the bounds: vLLM keeps a copy of it at every step of a request."""
    if not any(name in _NAMES for name, _ in headers):
        return headers
    return replaced(headers, of_request(headers))


def replaced(headers: list[tuple[bytes, bytes]], context: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Return headers with this trace context in the place of theirs."""
    rest = [header for header in headers if header[0] not in _NAMES]
    return rest + [(name.encode(), value.encode("latin-1")) for name, value in context.items()]


def limit_log(endpoint: str) -> None:
    """Have OpenTelemetry's exporter log a failure once a minute, and nothing that a client sent.

    Args:
        endpoint: Where spans are sent; its path, in which some receivers have a token, is left out.
    """
    logging.getLogger("opentelemetry.trace").setLevel(logging.CRITICAL)  # of headers that are no trace context
    logging.getLogger("opentelemetry.sdk._shared_internal").setLevel(logging.ERROR)  # of a full queue
    exporter = logging.getLogger("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    exporter.filters[:] = [_Seldom(endpoint)]


class _Seldom(logging.Filter):
    def __init__(self, endpoint: str) -> None:
        super().__init__()
        scheme, _, rest = endpoint.partition("://")
        self._path, self._logged_at = rest.partition("/")[2], -_LOG_EVERY_S
        self._shown = f"{scheme}://{rest.partition('/')[0].rpartition('@')[2]}"

    def filter(self, record: logging.LogRecord) -> bool:
        """Pass the first record in a minute, in words of this service."""
        if time.monotonic() - self._logged_at < _LOG_EVERY_S:
            return False
        self._logged_at = time.monotonic()
        reason = record.getMessage().replace(self._path, "…") if self._path else record.getMessage()
        record.msg, record.args = f"Traces do not reach {self._shown}; requests go on without them. {reason}", ()
        return True
