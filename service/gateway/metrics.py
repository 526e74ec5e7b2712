"""What is counted: for Prometheus at `/metrics`, and one JSON line a request. Neither holds content or keys."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

NO_MODEL = "-"  # of requests that were refused before one was known
_TTFB_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_HELD_S = (0.1, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 90, 120, 300, 600)
_PATH = 256  # characters of a path in a line
_TAIL = 1024  # bytes of an answer's end in which its usage stands
_PROMPT = re.compile(rb'"(?:prompt_tokens|input_tokens)"\s*:\s*(\d+)')
_COMPLETION = re.compile(rb'"(?:completion_tokens|output_tokens)"\s*:\s*(\d+)')


@dataclass(slots=True)
class Account:
    """What is known of one request, filled in on its way.

    Attributes:
        held_s: How long it waited for its pool.
        first_byte_s: From its first byte to the answer's.
        left: Its client went before the end.
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
    left: bool = False
    tail: bytes = b""
    head: bytes = b""

    def took(self, chunk: bytes) -> None:
        """Take note of bytes of the answer."""
        if self.first_byte_s is None:
            self.first_byte_s = time.perf_counter() - self.began
            if self.path == "/v1/messages":  # its streams tell the prompt's tokens at the beginning
                self.head = chunk[:_TAIL]
        self.bytes_out += len(chunk)
        if len(chunk) >= _TAIL:
            self.tail = chunk[-_TAIL:]
        else:
            self.tail = (self.tail + chunk)[-_TAIL:]

    def tokens(self) -> tuple[int, int] | None:
        """Return tokens of prompt and completion as the answer reported them, if it did."""
        prompt, completion = _last(_PROMPT, self.tail), _last(_COMPLETION, self.tail)
        if prompt is None and self.head:
            prompt = _last(_PROMPT, self.head)
        if prompt is None:
            return None
        return prompt, completion or 0


class Metrics:
    """The counters of one door.

    Args:
        access: Takes the line of each request that has ended; None: no lines are made.
    """

    def __init__(self, access: Callable[[str], None] | None = None) -> None:
        self._access = access
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "gateway_requests", "Requests that have ended", ["key", "model", "status"], registry=registry
        )
        self._running = Gauge("gateway_requests_running", "Requests under way", registry=registry)
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
        self._left = Counter("gateway_clients_left", "Clients that went before the end", ["model"], registry=registry)

    def begin(self) -> None:
        """Count a request that has come."""
        self._running.inc()

    def end(self, account: Account) -> None:
        """Count a request that has ended, and write its line."""
        self._running.dec()
        model = account.model
        self._requests.labels(account.key, model, str(account.status)).inc()
        self._bytes.labels("in").inc(account.bytes_in)
        self._bytes.labels("out").inc(account.bytes_out)
        if account.first_byte_s is not None:
            self._first_byte.labels(model).observe(account.first_byte_s)
        if account.cold:
            self._held.labels(model).observe(account.held_s)
        if account.left:
            self._left.labels(model).inc()
        tokens = account.tokens()
        if tokens:
            self._tokens.labels(account.key, model, "prompt").inc(tokens[0])
            self._tokens.labels(account.key, model, "completion").inc(tokens[1])
        if self._access:
            self._access(_line(account, tokens))

    def count_wake(self, model: str, is_ready: bool) -> None:
        """Count a wake that has ended."""
        self._wakes.labels(model, "ready" if is_ready else "failed").inc()

    def text(self) -> bytes:
        """Return all in Prometheus' format."""
        return generate_latest(self.registry)


def _line(account: Account, tokens: tuple[int, int] | None) -> str:
    def milliseconds(seconds: float | None) -> float | None:
        return None if seconds is None else round(seconds * 1000, 1)

    return json.dumps(
        {
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": account.id,
            "key": account.key,
            "method": account.method,
            "path": account.path[:_PATH],
            "model": account.model,
            "pool": account.pool,
            "status": account.status,
            "code": account.code,
            "stream": account.stream,
            "held_ms": milliseconds(account.held_s),
            "first_byte_ms": milliseconds(account.first_byte_s),
            "ms": milliseconds(time.perf_counter() - account.began),
            "bytes_in": account.bytes_in,
            "bytes_out": account.bytes_out,
            "prompt_tokens": tokens[0] if tokens else None,
            "completion_tokens": tokens[1] if tokens else None,
            "client_left": account.left,
        }
    )


def _last(pattern: re.Pattern[bytes], text: bytes) -> int | None:
    found = pattern.findall(text)
    return int(found[-1]) if found else None
