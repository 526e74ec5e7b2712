"""A receiver of OpenTelemetry's OTLP over HTTP, which decodes with the protocol's own definitions."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass(frozen=True)
class Received:
    """A span as it arrived; ids in hexadecimal, an empty one where there is none."""

    service: str
    name: str
    kind: int
    trace: str
    id: str
    parent: str
    state: str
    start: int
    end: int
    attributes: dict[str, Any]
    events: dict[str, dict[str, Any]]
    is_error: bool


class Receiver:
    """What has arrived.

    Attributes:
        status: What it answers with.
        pause_s: How long it takes for an answer.
        bytes_: All bodies and headers.
    """

    def __init__(self) -> None:
        self.status, self.pause_s = 200, 0.0
        self.url = ""
        self.requests = 0
        self.bytes_ = b""
        self.headers: list[dict[str, str]] = []
        self.spans: list[Received] = []

    def take(self, path: str, headers: dict[str, str], body: bytes) -> None:
        """Take a request."""
        assert path == "/v1/traces"
        assert headers["content-type"] == "application/x-protobuf"
        self.requests += 1
        self.headers.append(headers)
        self.bytes_ += str(headers).encode() + body
        if self.status != 200:
            return
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = str(_attributes(resource.resource.attributes).get("service.name"))
            for scope in resource.scope_spans:
                self.spans += [_received(service, span) for span in scope.spans]

    def named(self, *names: str, within_s: float = 10.0) -> list[Received]:
        """Wait for a span of each of these names, and return them in this order."""
        deadline = time.monotonic() + within_s
        while True:
            found = {span.name: span for span in self.spans}
            if found.keys() >= set(names):
                return [found[name] for name in names]
            assert time.monotonic() < deadline, f"{names} of {[(span.service, span.name) for span in self.spans]}"
            time.sleep(0.02)


def _received(service: str, span: Span) -> Received:
    return Received(
        service,
        span.name,
        span.kind,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.trace_state,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _attributes(span.attributes),
        {event.name: _attributes(event.attributes) for event in span.events},
        span.status.code == span.status.STATUS_CODE_ERROR,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return getattr(value, kind) if kind else None


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Receive on a free port of the loopback."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            time.sleep(receiver.pause_s)
            receiver.take(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
            answer = ExportTraceServiceResponse().SerializeToString()
            with contextlib.suppress(ConnectionError):  # the exporter's patience is over
                self.send_response(receiver.status)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    receiver.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
