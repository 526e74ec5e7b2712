"""Parses the requests of one connection with httptools, head by head and body by body."""

from __future__ import annotations

from typing import Protocol

import httptools

from service.gateway.http_server.head import Head, invalid
from service.in_engine.vllm_service import api_error
from service.in_engine.vllm_service.api_error import APIError
from service.in_engine.vllm_service.incomplete_heads import HEADER_BYTES, SEPARATOR_BYTES


class Handler(Protocol):
    """Whom the parser tells what has arrived."""

    def begin_request(self, head: Head) -> None:
        """Take a head."""

    def feed_body(self, piece: bytes) -> None:
        """Take a piece of the body."""

    def end_body(self) -> bool:
        """Note that the body is complete; return whether another request may follow."""


class RequestParser:
    """The parser of one connection.

    Args:
        handler: Gets the requests.
        head_limit: Bytes that a request line and its headers may have, and what of a body's coding is no body.

    Attributes:
        in_head: A head has begun and is not complete.
        url: The target of the last request, as it was sent.
    """

    def __init__(self, handler: Handler, head_limit: int) -> None:
        self.in_head = False
        self.url = b""
        self._handler, self._head_limit = handler, head_limit
        self._parser = httptools.HttpRequestParser(self)
        self._headers: list[tuple[bytes, bytes]] = []
        self._offers: list[tuple[bytes, bytes]] = []
        self._text_bytes = 0  # of the target, and of the names and values of the headers
        self._ended = False
        self._head_bytes = 0  # of the head or the trailers so far, and of what came before in the same read
        self._read_bytes = 0  # of this read, unless a part of a body came first
        self._no_body = 0  # of this read: what was no body
        self._held = 0  # of the head or the trailers so far, or somewhat more

    @property
    def held_bytes(self) -> int:
        """About how much memory a head, or trailers, take that are not complete."""
        return self._held + (HEADER_BYTES * len(self._headers) if self.in_head else 0)

    def feed(self, data: bytes) -> None:
        """Parse what has arrived; after the last request of the connection nothing more.

        Raises:
            APIError: The client must get this answer, and the connection must end.
        """
        while data and not self._ended:
            self._read_bytes = len(data)
            self._no_body = len(data)
            self._head_bytes += len(data)
            self._held += len(data)
            data = self._feed(data)
        if self._head_bytes > self._head_limit and not self._ended:
            raise api_error.head_too_large(self._head_limit)

    def close(self) -> None:
        """End it. httptools' parser and this one refer to each other, and garbage is collected rarely."""
        del self._parser

    def _feed(self, data: bytes) -> bytes:
        """Return what follows a head that offered an upgrade."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._feed_without_offer()
            return data[offer.args[0] :]
        except httptools.HttpParserError as error:
            if self._ended:
                return b""
            if isinstance(error.__context__, APIError):
                raise error.__context__ from None
            raise invalid(f"This is not valid HTTP: {error}.") from None
        return b""

    def _feed_without_offer(self) -> None:
        """Parse the head again without its `Upgrade`: the connection stays as it is (RFC 9110, section 7.8)."""
        headers, self._offers = self._headers, [header for header in self._headers if header[0] == b"upgrade"]
        line = b"%b %b HTTP/%b" % (self._parser.get_method(), self.url, self._parser.get_http_version().encode())
        lines = [line, *(b"%b: %b" % header for header in headers if header[0] != b"upgrade")]
        self._parser = httptools.HttpRequestParser(self)
        self._feed(b"\r\n".join((*lines, b"", b"")))

    def on_message_begin(self) -> None:
        """Begin a head."""
        if self._ended:
            raise invalid("This connection takes no further request.")
        self.in_head = True
        self.url, self._headers, self._text_bytes = b"", [], 0
        self._head_bytes, self._read_bytes = self._read_bytes, 0
        self._held = self._no_body

    def on_url(self, url: bytes) -> None:
        """Take a piece of the target."""
        self.url += url
        self._text_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; what comes after a chunked body is none."""
        if self.in_head:
            self._headers.append((name.lower(), value))
            self._text_bytes += len(name) + len(value)

    def on_headers_complete(self) -> None:
        """Pass the head on, unless it will be parsed again."""
        parser = self._parser
        method = parser.get_method().decode()
        if self._head_bytes > self._head_limit and self._size() > self._head_limit:
            raise api_error.head_too_large(self._head_limit)
        if not parser.should_upgrade():
            # What followed it in this read; blanks around its values are counted too, until the next piece of the body.
            self._no_body = min(self._no_body, max(0, self._held - self._size(SEPARATOR_BYTES)))
            self.in_head, self._head_bytes, self._held = False, 0, self._no_body
            headers, self._offers = self._headers + self._offers, []
            version = parser.get_http_version()
            self._handler.begin_request(Head(method, version, self.url, headers, parser.should_keep_alive()))
        elif method == "CONNECT":
            raise APIError(405, "CONNECT is for proxies, and this is none.")

    def on_body(self, piece: bytes) -> None:
        """Pass a piece of the body on."""
        self._head_bytes = self._read_bytes = 0
        self._no_body -= len(piece)
        self._held = self._no_body
        self._handler.feed_body(piece)

    def on_message_complete(self) -> None:
        """Pass the end of the body on."""
        if not self.in_head:
            self._ended = not self._handler.end_body()

    def _size(self, separators: int = 4) -> int:
        return self._text_bytes + separators * len(self._headers)
