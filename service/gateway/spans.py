"""The spans of a request: the request at the gateway, its wait for a replica, and its calls to engines.

Names and attributes are OpenTelemetry's conventions for HTTP and generative AI, and `vllm_service.*` where they have
none. They are metadata as in the request log: never content, headers, queries or keys. Spans are queued and exported by
a thread of OpenTelemetry's; where the queue is full the oldest are dropped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service import __version__, otel
from service.gateway.metrics import NO_MODEL, RequestLog
from service.gateway.pool import Pool
from service.in_engine.vllm_service import trace_context
from service.in_engine.vllm_service.api_error import APIError, Message
from service.in_engine.vllm_service.http_contract import ApiRoute

FLUSH_S = 2.0  # at the end of the gateway
_PORTS = {"http": 80, "https": 443}
_PATH = 256  # characters, as in the request log
_PROPAGATOR = TraceContextTextMapPropagator()
# gen_ai.operation.name; the conventions have none for other routes
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}

Headers = list[tuple[bytes, bytes]]


class Tracing:
    """Makes the spans of requests.

    Args:
        processor: Takes ended spans.
        name: The service's name in them; None: OpenTelemetry's variables name it.
    """

    def __init__(self, processor: SpanProcessor, name: str | None = None) -> None:
        own = {"service.version": __version__} | ({"service.name": name} if name else {})
        self._provider = TracerProvider(resource=Resource.create(own), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("service.gateway", __version__)

    @classmethod
    def from_variables(cls, used: Mapping[str, str]) -> Tracing:
        """Return what exports to the receiver that `otel.variables` names; OpenTelemetry reads the others itself."""
        endpoint = used[otel.TRACES_ENDPOINT]
        trace_context.limit_log(endpoint)
        exporter = BatchSpanProcessor(OTLPSpanExporter(endpoint))
        return cls(exporter, otel.service_name(used, "vllm-gateway"))

    def begin(self, scope: Message, route: ApiRoute, log: RequestLog) -> RequestTrace:
        """Begin the span of a request, as a part of the client's trace where it named one."""
        span = self._tracer.start_span(
            f"{route.method} {route.path}",
            _PROPAGATOR.extract(trace_context.of_request(scope["headers"])),
            SpanKind.SERVER,
            start_time=_nanoseconds(log.began, time.perf_counter()),
        )
        return RequestTrace(self._tracer, span, scope, route, log)

    def close(self) -> None:
        """Export what is queued, as far as that takes no longer than the flush may. Blocks."""
        flush = threading.Thread(target=self._provider.shutdown, name="flush traces", daemon=True)
        flush.start()
        flush.join(FLUSH_S)


class RequestTrace:
    """The spans of one request.

    Args:
        tracer: Makes spans.
        span: That of the request, which has begun.
        scope: The request.
        route: Its route.
        log: Its entry in the request log.
    """

    def __init__(self, tracer: Tracer, span: Span, scope: Message, route: ApiRoute, log: RequestLog) -> None:
        self._tracer, self._span, self._route, self._log = tracer, span, route, log
        self._context = set_span_in_context(span)
        self._call: Span | None = None
        if span.is_recording():
            span.set_attributes({
                "http.request.method": log.method,
                "http.route": route.path,
                "url.path": log.path[:_PATH],
                "url.scheme": scope.get("scheme", "http"),
                "vllm_service.request.id": log.id,
                "vllm_service.key.name": log.key,
            })  # fmt: skip

    @contextmanager
    def waiting(self, pool: Pool) -> Iterator[None]:
        """Trace the wait for a pool that is not ready, with the phases of the boot that it waits for."""
        attributes = {"vllm_service.pool.location": pool.location, "vllm_service.pool.state": pool.state}
        span = self._tracer.start_span("wait for replica", self._context, attributes={**self._model(), **attributes})
        began = time.monotonic()
        try:
            yield
        except Exception as error:
            span.set_attribute("error.type", error.code if isinstance(error, APIError) else type(error).__name__)
            span.set_status(Status(StatusCode.ERROR))
            raise
        finally:
            for phase in pool.woken_phases:
                if phase.end >= began:
                    seconds = {"vllm_service.phase.seconds": round(phase.end - phase.start, 3)}
                    span.add_event(phase.name, seconds, _nanoseconds(phase.start, time.monotonic()))
            span.end()

    def begin_call(self, pool: Pool, url: str, headers: Headers, *, streams: bool) -> Headers:
        """Begin the span of a call to an engine, and return headers that make the engine's spans a part of it.

        Args:
            pool: The engine's.
            url: Where the engine listens.
            headers: Those of the client's request.
            streams: The client asked for server-sent events.
        """
        operation = _OPERATIONS.get(self._log.path)
        name = f"{operation} {pool.spec.key}" if operation else f"{self._route.method} {self._route.path}"
        address = urlsplit(url)
        self._call = call = self._tracer.start_span(name, self._context, SpanKind.CLIENT)
        if call.is_recording():
            call.set_attributes({
                **self._model(),
                "gen_ai.provider.name": "vllm",
                "gen_ai.request.stream": streams,
                "gen_ai.response.model": pool.spec.key,
                "http.request.method": self._log.method,
                "server.address": address.hostname or "",
                "server.port": address.port or _PORTS.get(address.scheme, 0),
                "vllm_service.pool.location": pool.location,
            })  # fmt: skip
        context: dict[str, str] = {}
        _PROPAGATOR.inject(context, set_span_in_context(call))
        return trace_context.replaced(headers, context)

    def end_call(self, error: str | None = None) -> None:
        """End the span of the call, if one has begun; `error` is the code of the error that it ended with."""
        call, self._call = self._call, None
        if call is None:
            return
        log = self._log
        if error:
            call.set_attribute("error.type", error)
            call.set_status(Status(StatusCode.ERROR))
        if call.is_recording() and log.path in _OPERATIONS and (tokens := log.tokens()):
            call.set_attribute("gen_ai.usage.input_tokens", tokens[0])
            call.set_attribute("gen_ai.usage.output_tokens", tokens[1])
            if log.usage:
                call.set_attribute("gen_ai.usage.cache_read.input_tokens", log.usage.tokens_cached)
        if log.replica:
            call.set_attribute("vllm_service.replica.id", log.replica)
        call.end()

    def end(self) -> None:
        """End the request's span, with what its log says."""
        span, log = self._span, self._log
        self.end_call()
        if span.is_recording():
            status = 499 if log.client_left else log.status
            span.set_attributes({**self._model(), "http.response.status_code": status})
            if log.fallback_for:
                span.set_attribute("gen_ai.response.model", log.model)
            if log.code or status >= 400:
                span.set_attribute("error.type", log.code or str(status))
            if status >= 500:
                span.set_status(Status(StatusCode.ERROR))
        span.end()

    def _model(self) -> dict[str, str]:
        operation = _OPERATIONS.get(self._log.path)
        model = self._log.fallback_for or self._log.model
        found = {"gen_ai.operation.name": operation, "gen_ai.request.model": None if model == NO_MODEL else model}
        return {name: value for name, value in found.items() if value}


def _nanoseconds(at: float, now: float) -> int:
    """Return a time as nanoseconds since the epoch; `now` is the present on the same clock."""
    return time.time_ns() - int((now - at) * 1e9)
