"""The trace context among a request's headers, and the log of an exporter that fails."""

from __future__ import annotations

import logging

import pytest
from vllm_service import trace_context

PARENT = f"00-{'a' * 32}-{'b' * 16}-01".encode()
EXPORTER = logging.getLogger("opentelemetry.exporter.otlp.proto.http.trace_exporter")


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], {}),
        ([(b"traceparent", PARENT)], {"traceparent": PARENT.decode()}),
        ([(b"traceparent", PARENT)] * 2, {}),
        ([(b"tracestate", b"a=1")], {}),
        (
            [(b"tracestate", b"a=1"), (b"traceparent", PARENT), (b"tracestate", b"b=2")],
            {"traceparent": PARENT.decode(), "tracestate": "a=1,b=2"},
        ),
        ([(b"traceparent", PARENT), (b"tracestate", b"x" * 513)], {"traceparent": PARENT.decode()}),
        ([(b"traceparent", b"x" * 513), (b"tracestate", b"a=1")], {}),
    ],
)
def test_trace_context_is_bounded(headers: list[tuple[bytes, bytes]], expected: dict[str, str]) -> None:
    """Several headers of a state are one, several parents are none, and nothing is longer than 512 bytes."""
    assert trace_context.of_request(headers) == expected
    rest = [(b"accept", b"*/*")]
    bounded = trace_context.bounded(rest + headers)
    assert sorted(bounded) == sorted(rest + [(name.encode(), value.encode()) for name, value in expected.items()])


def test_headers_without_a_trace_context_are_not_copied() -> None:
    """As those of most requests."""
    headers = [(b"accept", b"*/*")]
    assert trace_context.bounded(headers) is headers


def test_exporter_that_fails_logs_once_a_minute_without_the_path(caplog: pytest.LogCaptureFixture) -> None:
    """Some receivers have a token in the path, or a password before the host."""
    trace_context.limit_log("https://user:s3cret@host:4318/s3cret/v1/traces")
    for _ in range(3):
        EXPORTER.error("Failed to export %s batch code: %s, url: %s", "spans", 401, "/s3cret/v1/traces")
    (record,) = caplog.records
    assert record.getMessage().startswith("Traces do not reach https://host:4318; requests go on without them.")
    assert "401" in record.getMessage()
    assert "s3cret" not in caplog.text
