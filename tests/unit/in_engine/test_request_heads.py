"""What a connection of the engine's server holds counts while a head is incomplete; uvicorn is stood in for."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import httptools
import pytest
from vllm_service import request_heads

KIB = 1024
HEAD = b"POST /v1/x HTTP/1.1\r\nHost: a\r\n" + b"".join(b"x-%d: %b\r\n" % (i, b"v" * 1000) for i in range(100))


class Transport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        """Keep it."""
        self.written += data

    def close(self) -> None:
        """Note it."""
        self.closed = True

    def is_closing(self) -> bool:
        """Tell whether it was closed."""
        return self.closed


@pytest.fixture
def protocol(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the protocol's class, changed, where all heads may take 1 MiB."""

    class HttpToolsProtocol:
        def __init__(self) -> None:
            self.transport = Transport()
            self.parser = httptools.HttpRequestParser(self)
            self.url, self.headers = b"", list[tuple[bytes, bytes]]()

        def data_received(self, data: bytes) -> None:
            self.parser.feed_data(data)

        def connection_lost(self, error: Exception | None) -> None:
            """Do nothing."""

        def on_message_begin(self) -> None:
            self.url, self.headers = b"", []

        def on_url(self, url: bytes) -> None:
            self.url += url

        def on_header(self, name: bytes, value: bytes) -> None:
            self.headers.append((name, value))

        def on_headers_complete(self) -> None:
            """Do nothing."""

        def on_body(self, piece: bytes) -> None:
            """Do nothing."""

        def on_message_complete(self) -> None:
            """Do nothing."""

    name = "uvicorn.protocols.http.httptools_impl"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(HttpToolsProtocol=HttpToolsProtocol))
    monkeypatch.setattr(request_heads, "ALL_HEADS_LIMIT", 1024 * KIB)
    request_heads.enable()
    return HttpToolsProtocol


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("body", [b"", b"b" * 2000])
def test_body_that_is_uploaded_is_no_incomplete_head(protocol: Any, pieces: int, body: bytes) -> None:
    """Whatever its head took, in one read or several, with a part of the body or without."""
    sent = HEAD + b"Content-Length: 100000\r\n\r\n" + body
    size = len(sent) // pieces + 1
    uploads = [protocol() for _ in range(40)]
    for upload in uploads:
        for start in range(0, len(sent), size):
            upload.data_received(sent[start : start + size])
    assert [one.transport.written for one in uploads if one.transport.written] == []


@pytest.mark.parametrize(
    "piece",
    [
        HEAD,
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a:b\r\n" * 1000,
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" + HEAD,
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n" + b"a: b\r\n" * 1000,
    ],
    ids=["long values", "short headers", "second request", "trailers"],
)
def test_incomplete_heads_of_the_engine_are_bounded(protocol: Any, piece: bytes) -> None:
    """The oldest end."""
    connections = [protocol() for _ in range(40)]
    for one in connections:
        one.data_received(piece)
    ended = [b" 503 " in one.transport.written or b" 429 " in one.transport.written for one in connections]
    assert ended == sorted(ended, reverse=True)
    assert 3 < sum(ended) < 38
