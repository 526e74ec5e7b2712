"""The head of a request, as bytes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import quote, urlencode


@lru_cache(256)
def request_target(path: str, query: str) -> str:
    """Return the target of a request: a path without escapes, and a query with them."""
    return quote(path, safe="/:@!$&'()*+,;=~") + (f"?{query}" if query else "")


def query_string(query: Mapping[str, str]) -> str:
    """Return a query with escapes."""
    return urlencode(query, quote_via=quote)


def header_lines(headers: Mapping[str, str]) -> bytes:
    """Return headers, each with the end of its line."""
    return b"".join(f"{name}: {value}\r\n".encode() for name, value in headers.items())


def request_head(method: str, target: str, lines: bytes, count: int) -> bytes:
    """Return a head.

    Args:
        method: HTTP method.
        target: See `request_target`.
        lines: The headers, each with the end of its line.
        count: How many.

    Raises:
        ValueError: A header has a line break or a NUL, or its number is not `count`.
    """
    head = b"%b %b HTTP/1.1\r\n%b\r\n" % (method.encode(), target.encode(), lines)
    if not head.count(b"\n") == head.count(b"\r") == head.count(b"\r\n") == count + 2 or b"\0" in head:
        raise ValueError("A header of a request to an engine has a line break or a NUL.")
    return head
