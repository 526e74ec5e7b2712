"""What the head of a request means: its target, and where its body ends (RFC 9112). What is ambiguous is refused."""

from __future__ import annotations

import http
import re
import secrets
from typing import Any
from urllib.parse import unquote

import httptools

from service.in_engine.vllm_service import api_error, http_contract
from service.in_engine.vllm_service.api_error import APIError

_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}".encode() for status in http.HTTPStatus}
_READ = frozenset((b"host", b"content-length", b"transfer-encoding", b"expect"))
_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=:%\[\]-]*")


def invalid(reason: str) -> APIError:
    """Return the error of a request that is not valid HTTP, or ambiguous."""
    return APIError(400, reason, code="invalid_http")


def status_line(status: int) -> bytes:
    """Return the first line of an answer, without its end."""
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d " % status


def answer(error: APIError, url: bytes, date: bytes) -> bytes:
    """Return the whole answer to a request that the server refuses itself; it is the last of its connection.

    Args:
        error: The reason.
        url: What the request asks for, as far as it is known.
        date: The `date` header.
    """
    path, request_id = url.partition(b"?")[0].decode("latin-1"), secrets.token_hex(16)
    body = error.body(path, request_id)
    own = {"Content-Type": http_contract.JSON, "Content-Length": str(len(body)), "Connection": "close"}
    headers = [f"{name.lower()}: {value}".encode() for name, value in {**own, **error.headers}.items()]
    headers += [b"%b: %b" % header for header in api_error.request_id_headers(path, request_id)]
    return b"\r\n".join((status_line(error.status), *headers, date, b"", body))


class Head:
    """The head of a request.

    Args:
        method: Method.
        version: Of HTTP, such as `1.1`.
        url: Target, as it was sent.
        headers: With names in lower case. httptools has refused repeated and contradicting lengths already.
        keep_alive: Whether another request may follow, by the headers.

    Attributes:
        length: Bytes of the body; None: it is chunked.
        expects_continue: Whether the client sends the body after a `100 Continue` only.

    Raises:
        APIError: It is ambiguous, or this server does not speak it.
    """

    __slots__ = ("_headers", "_method", "_url", "_version", "expects_continue", "keep_alive", "length")

    def __init__(
        self, method: str, version: str, url: bytes, headers: list[tuple[bytes, bytes]], keep_alive: bool
    ) -> None:
        if version not in {"1.0", "1.1"}:
            raise APIError(505, f"This is HTTP/{version}; this service speaks HTTP/1.1.", code="http_version")
        self._method, self._version, self._url, self._headers = method, version, url, headers
        self.keep_alive = keep_alive and version == "1.1"
        self.length: int | None = 0
        self.expects_continue = False
        hosts = 0
        for name, value in headers:
            if name in _READ:
                hosts += name == b"host"
                self._read(name, value)
        if hosts > 1 or (not hosts and version == "1.1"):
            raise invalid(f"The request has {hosts} Host headers, and must have one.")

    def _read(self, name: bytes, value: bytes) -> None:
        if name == b"content-length":
            self.length = api_error.parse_length(value)
        elif name == b"transfer-encoding":
            if self._version != "1.1" or value.lower() != b"chunked":
                raise invalid("The Transfer-Encoding must be 'chunked', of HTTP/1.1, or absent.")
            self.length = None
        elif name == b"expect":
            self.expects_continue = self._version == "1.1" and value.lower() == b"100-continue"
        elif not _HOST.fullmatch(value):
            raise invalid("The Host header must be a host, with a port where it has one.")

    def scope(self, connection: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
        """Return the ASGI scope.

        Args:
            connection: What is the same for all requests of the connection.
            state: The lifespan's.

        Raises:
            APIError: The target is no path.
        """
        url, headers = self._url, self._headers
        if url.startswith((b"http://", b"https://")):
            path, query, host = _parts(url)
            headers = [(b"host", host), *(header for header in headers if header[0] != b"host")]
        elif url.startswith(b"/") or (url == b"*" and self._method == "OPTIONS"):
            path, _, query = url.partition(b"?")
        else:
            raise invalid("The request's target must be a path.")
        if b"#" in url:
            raise invalid("The request's target has a '#': what follows it is not for a server.")
        text = path.decode("ascii")  # httptools refuses other bytes
        return {
            **connection,
            "http_version": self._version,
            "method": self._method,
            "path": unquote(text) if "%" in text else text,
            "raw_path": path,
            "query_string": query,
            "headers": headers,
            "state": state.copy(),
        }


def _parts(url: bytes) -> tuple[bytes, bytes, bytes]:
    """Return path, query and host of a whole URL, whose host replaces the header."""
    try:
        parts = httptools.parse_url(url)
    except httptools.HttpParserError:
        raise invalid("The request's target is not a valid URL.") from None
    host = (parts.host or b"") + (b":%d" % parts.port if parts.port else b"")
    return parts.path or b"/", parts.query or b"", host
