"""Counters for Prometheus, and the request log of one JSON line a request. Neither holds content or keys."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.gateway.counters import Histogram, Sums
from service.gateway.recent_requests import RecentRequests
from service.in_engine.vllm_service.usage_report import EngineUsage
from service.usage.ledger import Ledger
from service.usage.records import UsageRecord

if TYPE_CHECKING:
    from service.gateway.gauges import PoolGauges
    from service.gateway.spans import RequestTrace

NO_MODEL = "-"  # of requests that were refused before their model was known
_TTFB_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_DURATION_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_HELD_S = (0.1, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 90, 120, 300, 600)
_WAKE_OUTCOMES = ("failed", "ready")
_IN, _OUT = ("in",), ("out",)
_PATH = 256  # characters of a path in a line
_ANONYMOUS_LINES = 10  # a second, of requests without a valid key; the counters count all of them
_TAIL = 2048  # bytes of an answer's end in which its usage stands, or the error that ended its stream
_ENCODER = msgspec.json.Encoder()
_PROMPT = re.compile(rb'"(?:prompt_tokens|input_tokens)"\s*:\s*(\d+)')
_COMPLETION = re.compile(rb'"(?:completion_tokens|output_tokens)"\s*:\s*(\d+)')


@dataclass(slots=True)
class RequestLog:
    """The entry of one request in the request log, filled in while it is served.

    Attributes:
        model: The model that answered.
        fallback_for: The model that was requested, where a fallback answered.
        cold: It waited for a wake.
        is_held: It waits for its pool now.
        held_s: How long it waited for its pool.
        first_byte_s: From the request's first byte to the answer's.
        client_left: Its client left before the end.
        is_batch: It is a line of a batch.
        is_usage: It asked for an engine's work, so the ledger gets its record.
        usage: What the engine reported.
        replica: Id of the replica that answered.
        cost: Its share of what the replica cost, in dollars.
        dollars: What its caller owes.
        counted: Its tokens, where a limit has counted them at the end of the answer.
        trace: Its spans; None: it is not traced.
    """

    id: str
    method: str
    path: str
    began: float = field(default_factory=time.perf_counter)
    key: str = NO_MODEL
    model: str = NO_MODEL
    pool: str = NO_MODEL
    fallback_for: str | None = None
    status: int = 0
    code: str | None = None
    stream: bool = False
    cold: bool = False
    is_held: bool = False
    held_s: float = 0.0
    first_byte_s: float | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    client_left: bool = False
    tail: bytes = b""
    head: bytes = b""
    is_batch: bool = False
    is_usage: bool = False
    usage: EngineUsage | None = None
    replica: str | None = None
    cost: float | None = None
    dollars: float | None = None
    counted: tuple[int, int] | None = None
    trace: RequestTrace | None = None

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
        """Return tokens of prompt and completion if the engine reported them; an older one does so in its answer."""
        if self.counted:
            return self.counted
        if self.usage:
            return self.usage.tokens_in, self.usage.tokens_out
        if b"_tokens" not in self.tail and not self.head:
            return None
        prompt, completion = _last(_PROMPT, self.tail), _last(_COMPLETION, self.tail)
        if prompt is None and self.head:
            prompt = _last(_PROMPT, self.head)
        if prompt is None:
            return None
        return prompt, completion or 0

    def usage_record(self, tokens: tuple[int, int] | None) -> UsageRecord:
        """Return what the ledger keeps of it."""
        return UsageRecord(
            at=time.time(),
            key=self.key,
            model=self.model,
            tokens_in=tokens[0] if tokens else None,
            tokens_cached=self.usage.tokens_cached if self.usage else None,
            tokens_out=tokens[1] if tokens else None,
            seconds=time.perf_counter() - self.began,
            held_s=self.held_s,
            status=499 if self.client_left else self.status,
            replica=self.replica,
            cost=self.cost,
            dollars=self.dollars,
        )


class Metrics:
    """The counters of one gateway.

    Args:
        write_log: Takes the JSON line of each request that has ended; None: there is no request log.
        ledger: Takes the record of each request for an engine; None: there is no ledger.
    """

    def __init__(self, write_log: Callable[[str], None] | None = None, ledger: Ledger | None = None) -> None:
        self._write_log, self.ledger = write_log, ledger
        self._second = self._anonymous = 0
        self._pools: PoolGauges | None = None
        self.recent = RecentRequests()
        self.registry = registry = CollectorRegistry()
        self._requests = Sums("gateway_requests", "Requests that have ended", ["key", "model", "status"])
        self._running = Gauge("gateway_requests_running", "Requests being served", registry=registry)
        self._first_byte = Histogram(
            "gateway_time_to_first_byte_seconds", "From a request's arrival to the first byte of its answer", _TTFB_S
        )
        self._duration = Histogram(
            "gateway_request_duration_seconds",
            "From a request's arrival to the end of its answer, of requests for an engine's work",
            _DURATION_S,
        )
        self._held = Histogram("gateway_held_seconds", "Time held for a cold pool", _HELD_S)
        self._wakes = Counter("gateway_cold_starts", "Wakes of pools", ["model", "outcome"], registry=registry)
        self._tokens = Sums("gateway_tokens", "Tokens that answers reported", ["key", "model", "kind"])
        self._dollars = Sums(
            "gateway_dollars", "What requests cost their callers, as the ledger has it", ["key", "model"]
        )
        self._bytes = Sums("gateway_bytes", "Bytes of bodies", ["direction"])
        sums = (self._requests, self._first_byte, self._duration, self._held, self._tokens, self._dollars, self._bytes)
        for collector in sums:
            registry.register(collector)
        self._tasks = Gauge("gateway_tasks", "Tasks of the event loop that have not ended", registry=registry)
        self._left = Counter("gateway_clients_left", "Clients that left before the end", ["model"], registry=registry)

        self._late = Counter(
            "gateway_late_requests", "Requests that crossed the close of an idle connection", registry=registry
        )
        if ledger:
            registry.register(_LedgerCounters(ledger))

    def begin(self, log: RequestLog) -> None:
        """Count a request that has arrived."""
        self.recent.begin(log)

    def end(self, log: RequestLog) -> None:
        """Count a request that has ended, and write its line."""
        key, model = log.key, log.model
        self._requests.add((key, model, str(log.status)))
        self._bytes.add(_IN, log.bytes_in)
        self._bytes.add(_OUT, log.bytes_out)
        if log.is_usage:
            self._duration.observe(model, time.perf_counter() - log.began)
        if log.first_byte_s is not None and (log.is_usage or model == NO_MODEL):  # no scrapes of an engine's metrics
            self._first_byte.observe(model, log.first_byte_s)
        if log.cold:
            self._held.observe(model, log.held_s)
        if log.client_left:
            self._left.labels(model).inc()
        tokens = log.tokens()
        self.recent.end(log, tokens)
        if tokens:
            self._tokens.add((key, model, "prompt"), tokens[0])
            self._tokens.add((key, model, "completion"), tokens[1])
        if log.dollars:
            self._dollars.add((key, model), log.dollars)
        if self.ledger and log.is_usage:
            self.ledger.record(log.usage_record(tokens))
        if self._write_log and (log.key != NO_MODEL or self._takes_anonymous()):
            self._write_log(_line(log, tokens))

    def _takes_anonymous(self) -> bool:
        """Tell whether a request without a valid key may have a line: anybody can send such, as many as they like."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._anonymous = second, 0
        self._anonymous += 1
        return self._anonymous <= _ANONYMOUS_LINES

    def count_wake(self, model: str, is_ready: bool) -> None:
        """Count a wake that has ended."""
        self._wakes.labels(model, _WAKE_OUTCOMES[is_ready]).inc()

    def count_late_request(self) -> None:
        """Count a request that crossed the close of an idle connection; nothing answers it."""
        self._late.inc()

    def watch(self, pools: PoolGauges, *others: Collector) -> None:
        """Show these as well."""
        self._pools = pools
        for collector in (pools, *others):
            self.registry.register(collector)

    async def text(self) -> bytes:
        """Return all counters in Prometheus' format."""
        if self._pools:
            await self._pools.refresh()
            for model in self._pools.models:  # Prometheus sees no increase in a counter that begins with 1
                for outcome in _WAKE_OUTCOMES:
                    self._wakes.labels(model, outcome)
            for model in self._pools.used_models:
                self._held.show(model)
        self._running.set(self.recent.running)
        self._tasks.set(len(asyncio.all_tasks()))
        return generate_latest(self.registry)


class _LedgerCounters(Collector):
    """What the ledger has written, lost, and not written yet."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def collect(self) -> Iterator[Metric]:
        """Return them as they are now."""
        yield CounterMetricFamily("gateway_ledger_rows", "Requests written to the ledger", self._ledger.written)
        yield CounterMetricFamily("gateway_ledger_lost", "Requests that the ledger has lost", self._ledger.lost)
        yield GaugeMetricFamily("gateway_ledger_waiting", "Requests not written yet", self._ledger.waiting)


def _line(log: RequestLog, tokens: tuple[int, int] | None) -> str:
    ms = (time.perf_counter() - log.began) * 1000
    line = _ENCODER.encode(
        {
            "at": _utc_text(time.time()),
            "id": log.id,
            "key": log.key,
            "method": log.method,
            "path": log.path[:_PATH],
            "model": log.model,
            "pool": log.pool,
            "fallback_for": log.fallback_for,
            "status": log.status,
            "code": log.code,
            "stream": log.stream,
            "held_ms": round(log.held_s * 1000, 1) if log.held_s else 0.0,
            "first_byte_ms": None if log.first_byte_s is None else round(log.first_byte_s * 1000, 1),
            "ms": round(ms, 1),
            "bytes_in": log.bytes_in,
            "bytes_out": log.bytes_out,
            "replica": log.replica,
            "prompt_tokens": tokens[0] if tokens else None,
            "completion_tokens": tokens[1] if tokens else None,
            "client_left": log.client_left,
        }
    )
    # A path may hold what controls a terminal, beyond what JSON escapes.
    return line.decode() if line.isascii() else json.dumps(json.loads(line))


def _utc_text(at: float) -> str:
    """Return a time in ISO 8601, with milliseconds."""
    return f"{_utc_second(int(at))}.{int(at % 1 * 1000):03d}+00:00"


@lru_cache(1)
def _utc_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def _last(pattern: re.Pattern[bytes], text: bytes) -> int | None:
    found = pattern.findall(text)
    return int(found[-1]) if found else None
