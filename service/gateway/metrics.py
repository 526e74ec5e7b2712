"""Counters for Prometheus, and the request log of one JSON line a request. Neither holds content or keys."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

NO_MODEL = "-"  # of requests that were refused before their model was known
_TTFB_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_HELD_S = (0.1, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 90, 120, 300, 600)
_PATH = 256  # characters of a path in a line
_TAIL = 1024  # bytes of an answer's end in which its usage stands
_PROMPT = re.compile(rb'"(?:prompt_tokens|input_tokens)"\s*:\s*(\d+)')
_COMPLETION = re.compile(rb'"(?:completion_tokens|output_tokens)"\s*:\s*(\d+)')


@dataclass(slots=True)
class RequestLog:
    """The entry of one request in the request log, filled in while it is served.

    Attributes:
        cold: It waited for a wake.
        held_s: How long it waited for its pool.
        first_byte_s: From the request's first byte to the answer's.
        client_left: Its client left before the end.
    """

    id: str
    method: str
    path: str
    began: float = field(default_factory=time.perf_counter)
    key: str = NO_MODEL
    model: str = NO_MODEL
    pool: str = NO_MODEL
    status: int = 0
    code: str | None = None
    stream: bool = False
    cold: bool = False
    held_s: float = 0.0
    first_byte_s: float | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    client_left: bool = False
    tail: bytes = b""
    head: bytes = b""

    def record_chunk(self, chunk: bytes) -> None:
        """Record bytes of the answer."""
        if self.first_byte_s is None:
            self.first_byte_s = time.perf_counter() - self.began
            if self.path == "/v1/messages":  # its streams report the prompt's tokens at the beginning
                self.head = chunk[:_TAIL]
        self.bytes_out += len(chunk)
        if len(chunk) >= _TAIL:
            self.tail = chunk[-_TAIL:]
        else:
            self.tail = (self.tail + chunk)[-_TAIL:]

    def tokens(self) -> tuple[int, int] | None:
        """Return tokens of prompt and completion if the answer reported them."""
        prompt, completion = _last(_PROMPT, self.tail), _last(_COMPLETION, self.tail)
        if prompt is None and self.head:
            prompt = _last(_PROMPT, self.head)
        if prompt is None:
            return None
        return prompt, completion or 0


class Metrics:
    """The counters of one gateway.

    Args:
        write_log: Takes the JSON line of each request that has ended; None: there is no request log.
    """

    def __init__(self, write_log: Callable[[str], None] | None = None) -> None:
        self._write_log = write_log
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "gateway_requests", "Requests that have ended", ["key", "model", "status"], registry=registry
        )
        self._running = Gauge("gateway_requests_running", "Requests being served", registry=registry)
        self._first_byte = Histogram(
            "gateway_time_to_first_byte_seconds",
            "From a request's arrival to the first byte of its answer",
            ["model"],
            buckets=_TTFB_S,
            registry=registry,
        )
        self._held = Histogram(
            "gateway_held_seconds", "Time held for a cold pool", ["model"], buckets=_HELD_S, registry=registry
        )
        self._wakes = Counter("gateway_cold_starts", "Wakes of pools", ["model", "outcome"], registry=registry)
        self._tokens = Counter(
            "gateway_tokens", "Tokens that answers reported", ["key", "model", "kind"], registry=registry
        )
        self._bytes = Counter("gateway_bytes", "Bytes of bodies", ["direction"], registry=registry)
        self._left = Counter("gateway_clients_left", "Clients that left before the end", ["model"], registry=registry)

    def begin(self) -> None:
        """Count a request that has arrived."""
        self._running.inc()

    def end(self, log: RequestLog) -> None:
        """Count a request that has ended, and write its line."""
        self._running.dec()
        model = log.model
        self._requests.labels(log.key, model, str(log.status)).inc()
        self._bytes.labels("in").inc(log.bytes_in)
        self._bytes.labels("out").inc(log.bytes_out)
        if log.first_byte_s is not None:
            self._first_byte.labels(model).observe(log.first_byte_s)
        if log.cold:
            self._held.labels(model).observe(log.held_s)
        if log.client_left:
            self._left.labels(model).inc()
        tokens = log.tokens()
        if tokens:
            self._tokens.labels(log.key, model, "prompt").inc(tokens[0])
            self._tokens.labels(log.key, model, "completion").inc(tokens[1])
        if self._write_log:
            self._write_log(_line(log, tokens))

    def count_wake(self, model: str, is_ready: bool) -> None:
        """Count a wake that has ended."""
        self._wakes.labels(model, "ready" if is_ready else "failed").inc()

    def text(self) -> bytes:
        """Return all counters in Prometheus' format."""
        return generate_latest(self.registry)


def _line(log: RequestLog, tokens: tuple[int, int] | None) -> str:
    def milliseconds(seconds: float | None) -> float | None:
        return None if seconds is None else round(seconds * 1000, 1)

    return json.dumps(
        {
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": log.id,
            "key": log.key,
            "method": log.method,
            "path": log.path[:_PATH],
            "model": log.model,
            "pool": log.pool,
            "status": log.status,
            "code": log.code,
            "stream": log.stream,
            "held_ms": milliseconds(log.held_s),
            "first_byte_ms": milliseconds(log.first_byte_s),
            "ms": milliseconds(time.perf_counter() - log.began),
            "bytes_in": log.bytes_in,
            "bytes_out": log.bytes_out,
            "prompt_tokens": tokens[0] if tokens else None,
            "completion_tokens": tokens[1] if tokens else None,
            "client_left": log.client_left,
        }
    )


def _last(pattern: re.Pattern[bytes], text: bytes) -> int | None:
    found = pattern.findall(text)
    return int(found[-1]) if found else None
