"""Two changes to how uvicorn reads requests: heads have limits, each and all, and trailers are no headers.

uvicorn 0.54 keeps a head of any size: 100 MB of headers from a client without a key grew vLLM's API server by 2 GB, and
as one value took it 49 s. It waits for the rest of a head without end, on any number of connections. It appends the
trailers of a chunked body to the request's headers, where a key would admit.
"""

from __future__ import annotations

import http
import secrets
from collections.abc import Callable
from typing import Any

from . import api_error
from .api_error import APIError
from .http_contract import ALL_HEADS_LIMIT, HEAD_LIMIT, JSON
from .incomplete_heads import HEADER_BYTES, SEPARATOR_BYTES, IncompleteHeads


def enable() -> None:
    """Change uvicorn in this process."""
    _drop_trailers()
    _limit_heads()


def _drop_trailers() -> None:
    """Let uvicorn's parser collect what comes after a head in a list of its own."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    complete = HttpToolsProtocol.on_headers_complete

    def on_headers_complete(self: HttpToolsProtocol) -> None:
        complete(self)
        if not self.parser.should_upgrade():  # an upgrade has no body, and uvicorn looks at its headers again
            self.headers = []

    HttpToolsProtocol.on_headers_complete = on_headers_complete  # type: ignore[method-assign]


def _limit_heads() -> None:
    """End a connection whose bytes have been neither a whole head nor a body for too long.

    And of those whose head or trailers are incomplete the oldest ones, where all of them take too much memory.
    """
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    receive, lose = HttpToolsProtocol.data_received, HttpToolsProtocol.connection_lost
    heads = IncompleteHeads[HttpToolsProtocol](ALL_HEADS_LIMIT)

    def before(name: str, count: Callable[..., None]) -> None:
        callback = getattr(HttpToolsProtocol, name)

        def count_and_call(self: Any, *arguments: bytes) -> None:
            count(self, *arguments)
            callback(self, *arguments)

        setattr(HttpToolsProtocol, name, count_and_call)

    def begin(self: Any) -> None:
        self.is_incomplete, self.held, self.parsed = True, self.no_body, 0

    def take_header(self: Any, name: bytes, value: bytes) -> None:
        self.held += HEADER_BYTES
        self.parsed += len(name) + len(value) + SEPARATOR_BYTES + HEADER_BYTES

    def end_head(self: Any) -> None:
        # What followed it in this read; blanks around its values are counted too, until the next piece of the body.
        self.no_body = min(self.no_body, max(0, self.held - len(self.url) - self.parsed))
        self.unparsed, self.held = 0, self.no_body

    def take_body(self: Any, piece: bytes) -> None:
        self.no_body -= len(piece)
        self.unparsed, self.held = 0, self.no_body

    def end(self: Any) -> None:
        self.unparsed, self.is_incomplete = 0, False

    def data_received(self: Any, data: bytes) -> None:
        self.unparsed = getattr(self, "unparsed", 0) + len(data)
        self.held = getattr(self, "held", 0) + len(data)  # somewhat more, where the read has a whole head too
        self.no_body = len(data)  # of this read
        receive(self, data)
        if self.unparsed > HEAD_LIMIT:
            refuse(self, api_error.head_too_large(HEAD_LIMIT))
            return
        for oldest in heads.hold(self, self.held if getattr(self, "is_incomplete", False) else 0):
            refuse(oldest, api_error.too_many_heads())

    def refuse(connection: Any, error: APIError) -> None:
        heads.release(connection)
        if not connection.transport.is_closing():
            connection.transport.write(_answer(error))
            connection.transport.close()

    def connection_lost(self: Any, error: Exception | None) -> None:
        heads.release(self)
        lose(self, error)

    before("on_message_begin", begin)
    before("on_header", take_header)
    before("on_headers_complete", end_head)
    before("on_body", take_body)
    before("on_message_complete", end)
    HttpToolsProtocol.data_received = data_received  # type: ignore[method-assign]
    HttpToolsProtocol.connection_lost = connection_lost  # type: ignore[method-assign]


def _answer(error: APIError) -> bytes:
    body = error.body("", secrets.token_hex(16))
    status = f"{error.status} {http.HTTPStatus(error.status).phrase}"
    own = {"Content-Type": JSON, "Content-Length": str(len(body)), "Connection": "close"}
    headers = "".join(f"{name.lower()}: {value}\r\n" for name, value in {**own, **error.headers}.items())
    return f"HTTP/1.1 {status}\r\n{headers}\r\n".encode() + body
