"""Requests byte by byte that no client sends: hostile, ambiguous, broken ones, and what must come of each.

Those that the gateway's own server refuses in its tests are a part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.gateway.refused_requests import REFUSED

from .targets import KEY

MARK = b"/hidden"  # the path of a request that no server may find in the bytes of another
AUTHORIZED = f"Host: localhost\r\nAuthorization: Bearer {KEY}\r\n".encode()
HIDDEN = b"GET %b HTTP/1.1\r\n%b\r\n" % (MARK, AUTHORIZED)
GET = b"GET /v1/models HTTP/1.1\r\n" + AUTHORIZED
POST = b"POST /tokenize HTTP/1.1\r\n" + AUTHORIZED + b"Content-Type: application/json\r\n"
BODY = b'{"model": "tiny", "prompt": "x"}'
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
REFUSES, EITHER = frozenset({400}), frozenset({200, 400})
CLOSES = 0  # in place of a status: the connection ends without an answer
# What uvicorn, the server in front of the guard, serves. Where these requests end is clear, and what they say of hosts
# and versions the guard does not read, so a request behind one of them is a second request in its own right.
SERVED_BY_UVICORN = {
    *("gateways_own: no host", "gateways_own: two hosts", "gateways_own: two hosts of 1.0"),
    *("gateways_own: host with a path", "gateways_own: host with a space", "gateways_own: fragment"),
    *("gateways_own: star", "gateways_own: other scheme", "gateways_own: coding before chunked"),
    *("codings: 'identity, chunked'", "versions: GET /v1/models"),
    *("versions: GET /v1/models HTTP/0.9", "versions: GET /v1/models HTTP/2.0"),
}


@dataclass(frozen=True)
class RawCase:
    """Bytes, and what comes back.

    Attributes:
        sent: What the client writes; it writes no more, and leaves the connection open.
        statuses: Which the first answer may have.
        answers: The most answers that may come.
    """

    sent: bytes
    statuses: frozenset[int] = REFUSES
    answers: int = 1


def cases() -> dict[str, RawCase]:
    """Return all cases by name."""
    groups = (gateways_own, smuggling, lengths, codings, chunks, heads, targets, versions, hosts, sequences)
    return {f"{group.__name__}: {name}": case for group in groups for name, case in group()}


def gateways_own() -> Iterator[tuple[str, RawCase]]:
    """Yield what the gateway's server refuses, each before a request that must not be found."""
    for name, sent in REFUSED.items():
        with_path = sent.replace(b"POST /a ", b"POST /tokenize ").replace(b"GET /a", b"GET /v1/models")
        yield name, RawCase(with_path.replace(b"Host: x\r\n", AUTHORIZED, 1) + HIDDEN, frozenset({400, 401, 404, 505}))


def smuggling() -> Iterator[tuple[str, RawCase]]:
    """Yield requests whose end two servers see at two places."""
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    length, coding = b"Content-Length: %d\r\n", b"Transfer-Encoding: chunked\r\n"
    for name, body in (("CL.TE", b"0\r\n\r\n" + HIDDEN), ("TE.CL", b"%x\r\n%b\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN))):
        for size in (4, len(body)):
            yield f"{name} {size}", RawCase(POST + length % size + coding + b"\r\n" + body)
            yield f"{name} {size}, coding first", RawCase(POST + coding + length % size + b"\r\n" + body)
    obfuscated = {
        "tab": b"Transfer-Encoding:\tchunked\r\nTransfer-Encoding: identity\r\n",
        "capitals": b"TRANSFER-ENCODING: CHUNKED\r\nContent-Length: 4\r\n",
        "blank before colon": b"Transfer-Encoding : chunked\r\nContent-Length: 4\r\n",
        "form feed": b"Transfer-Encoding: \x0cchunked\r\nContent-Length: 4\r\n",
        "NUL": b"Transfer-Encoding: chunked\0\r\nContent-Length: 4\r\n",
        "blank at the line's begin": b" Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        "folded": b"Transfer-Encoding:\r\n chunked\r\nContent-Length: 4\r\n",
        "behind a bare LF": b"X: y\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        "behind a bare CR": b"X: y\rTransfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        "underscore": b"Transfer_Encoding: chunked\r\nContent-Length: 4\r\nContent-Length: 5\r\n",
        "trailing comma": b"Transfer-Encoding: chunked,\r\nContent-Length: 4\r\n",
        "leading comma": b"Transfer-Encoding: ,chunked\r\nContent-Length: 4\r\n",
        "parameter": b"Transfer-Encoding: chunked;q=1\r\nContent-Length: 4\r\n",
        "cow": b"Transfer-Encoding: cow\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        "listed twice": b"Transfer-Encoding: chunked, chunked\r\nContent-Length: 4\r\n",
        "long s": "Tran\u017ffer-Encoding: chunked\r\nContent-Length: 4\r\nContent-Length: 5\r\n".encode(),
    }
    for name, lines in obfuscated.items():
        yield f"coding {name}", RawCase(POST + lines + b"\r\n0\r\n\r\n" + HIDDEN)
    for name, lines in {
        "different": b"Content-Length: 0\r\nContent-Length: %d\r\n" % len(HIDDEN),
        "equal": b"Content-Length: 0\r\nContent-Length: 0\r\n",
        "blank before colon": b"Content-Length : 0\r\n",
        "in capitals": b"CONTENT-LENGTH: 0\r\ncontent-length: %d\r\n" % len(HIDDEN),
        "in a list": b"Content-Length: 0, %d\r\n" % len(HIDDEN),
    }.items():
        yield f"lengths {name}", RawCase(POST + lines + b"\r\n" + HIDDEN)
    yield "length of a GET", RawCase(GET + b"Content-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN, EITHER)
    yield (
        "chunks of a GET",
        RawCase(GET + coding + b"\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN), EITHER),
    )
    yield "whole body within a body", RawCase(POST + length % (len(chunked) + len(HIDDEN)) + b"\r\n" + chunked + HIDDEN)


def lengths() -> Iterator[tuple[str, RawCase]]:
    """Yield lengths that are no numbers, or such as no body has."""
    values = (
        "",
        " ",
        "-1",
        "-0",
        "+0",
        "0x0",
        "1e1",
        "1.0",
        "1_0",
        "0 0",
        "0;",
        "\u0661",
        "\u0663",
        "1\t1",
        "a",
        "0b1",
        "''",
    )
    for value in values:
        yield repr(value), RawCase(POST + f"Content-Length: {value}\r\n\r\n".encode() + BODY + HIDDEN)
    for digits in (19, 20, 21, 100, 5000):
        sent = POST + b"Content-Length: " + b"9" * digits + b"\r\n\r\n" + BODY
        yield f"{digits} nines", RawCase(sent, frozenset({400, 413}))
        yield f"{digits} zeros", RawCase(POST + b"Content-Length: " + b"0" * digits + b"\r\n\r\n", frozenset({400}))
    yield "2**63", RawCase(POST + b"Content-Length: %d\r\n\r\n" % 2**63, frozenset({400, 413}))
    yield "2**64", RawCase(POST + b"Content-Length: %d\r\n\r\n" % 2**64, frozenset({400, 413}))


def codings() -> Iterator[tuple[str, RawCase]]:
    """Yield codings of a transfer that are not chunked alone."""
    for value in (
        "",
        "gzip",
        "deflate",
        "compress",
        "br",
        "identity, chunked",
        "chunked, identity",
        "x",
        "chunked\x0b",
    ):
        sent = POST + f"Transfer-Encoding: {value}\r\n\r\n0\r\n\r\n".encode()
        yield repr(value), RawCase(sent + HIDDEN, frozenset({400, 501}))
    for value in ("gzip", "br", "zstd, gzip", "x" * 1000, "\xff", "gzip;q=1", ""):
        sent = POST + b"Content-Encoding: %b\r\nContent-Length: %d\r\n\r\n" % (value.encode("latin-1"), len(BODY))
        yield f"content {value[:20]!r}", RawCase(sent + BODY, frozenset({200, 400, 415}))


def chunks() -> Iterator[tuple[str, RawCase]]:
    """Yield chunks that are none."""
    sizes = (
        "",
        " ",
        "-1",
        "+1",
        "0x1",
        "g",
        "1 1",
        "1;",
        "1;\n",
        "\t1",
        "10000000000000000",
        "f" * 17,
        "f" * 1000,
        "1\0",
        "\u0661",
    )
    for size in sizes:
        yield f"size {size[:20]!r}", RawCase(CHUNKED + size.encode() + b"\r\n" + HIDDEN, frozenset({400, 413}))
    yield "line feed alone", RawCase(CHUNKED + b"1\na\n0\n\n" + HIDDEN)
    yield "carriage return alone", RawCase(CHUNKED + b"1\ra\r0\r\r" + HIDDEN)
    yield "longer than its size", RawCase(CHUNKED + b"1\r\nabc\r\n0\r\n\r\n" + HIDDEN)
    yield "without its line end", RawCase(CHUNKED + b"1\r\na0\r\n\r\n" + HIDDEN)
    yield "endless extension", RawCase(CHUNKED + b"1;" + b"x" * 300_000, frozenset({400, 413, 431, CLOSES}), answers=1)
    yield (
        "endless trailer",
        RawCase(
            CHUNKED + b"%x\r\n%b\r\n0\r\nX: " % (len(BODY), BODY) + b"x" * 300_000, frozenset({200, 400, 431, CLOSES})
        ),
    )
    yield "request as trailer", RawCase(CHUNKED + b"0\r\n" + HIDDEN, frozenset({400}))
    yield "length as trailer", RawCase(CHUNKED + b"0\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN, REFUSES, 2)


def heads() -> Iterator[tuple[str, RawCase]]:
    """Yield heads that are broken or without measure."""
    for byte in (0, 1, 7, 8, 11, 12, 14, 27, 127):
        yield f"byte {byte} in a name", RawCase(GET + b"a%cb: c\r\n\r\n" % byte + HIDDEN)
        yield f"byte {byte} in a value", RawCase(GET + b"a: b%cc\r\n\r\n" % byte + HIDDEN, EITHER, 2)
    yield "NUL in a value", RawCase(GET + b"a: b\0c\r\n\r\n" + HIDDEN)
    yield "NUL in the method", RawCase(b"G\0T" + GET[3:] + b"\r\n" + HIDDEN)
    yield "NUL in the target", RawCase(GET.replace(b"models", b"mod\0els") + b"\r\n" + HIDDEN)
    yield "only NULs", RawCase(b"\0" * 100)
    yield "blank in a name", RawCase(GET + b"a b: c\r\n\r\n" + HIDDEN)
    yield "bytes beyond ASCII in a name", RawCase(GET + b"\xe9: c\r\n\r\n" + HIDDEN)
    huge = frozenset({400, 431, CLOSES})
    yield "huge value", RawCase(GET + b"a: " + b"b" * 500_000 + b"\r\n\r\n", huge)
    yield "huge name", RawCase(GET + b"a" * 500_000 + b": b\r\n\r\n", huge)
    yield "huge method", RawCase(b"A" * 500_000 + b" / HTTP/1.1\r\n\r\n", huge)
    yield "huge target", RawCase(b"GET /" + b"a" * 500_000 + b" HTTP/1.1\r\n" + AUTHORIZED + b"\r\n", huge)
    yield "huge query", RawCase(b"GET /v1/models?" + b"a" * 500_000 + b" HTTP/1.1\r\n" + AUTHORIZED + b"\r\n", huge)
    yield "100,000 headers", RawCase(GET + b"a: b\r\n" * 100_000 + b"\r\n", huge)
    yield "100,000 cookies", RawCase(GET + b"Cookie: a=b\r\n" * 100_000 + b"\r\n", huge)
    for size in (1, 2, 4, len(GET) // 2, len(GET)):
        yield f"half head of {size} bytes", RawCase(GET[:size], frozenset({CLOSES, 408}), 1)
    yield "half body", RawCase(POST + b"Content-Length: 100\r\n\r\n{", frozenset({CLOSES, 408}), 1)
    yield "nothing", RawCase(b"", frozenset({CLOSES, 408}), 1)
    yield "blank lines", RawCase(b"\r\n" * 1000, frozenset({CLOSES, 400, 408}), 1)


def targets() -> Iterator[tuple[str, RawCase]]:
    """Yield targets that are no path of this service."""
    not_found = frozenset({400, 404})
    for target in (
        *(
            "http://evil.example/hidden",
            "http://127.0.0.1:1/hidden",
            "https://localhost/hidden",
            "//evil.example/hidden",
        ),
        *(
            "http://",
            "http:///hidden",
            "http://[/hidden",
            "http://[::1/hidden",
            "http://a:b@/hidden",
            "http://x:99999999/",
        ),
        *(
            "http://x:-1/",
            "http:hidden",
            "ftp://x/hidden",
            "file:///etc/passwd",
            "javascript:x",
            "localhost:80",
            "*",
            "?",
            "#",
        ),
        *(
            "/../hidden",
            "/%2e%2e/hidden",
            "/v1/..%2f..%2fhidden",
            "/hidden%00",
            "/%",
            "/%zz",
            "/%ff",
            "/\\hidden",
            "\\hidden",
        ),
        *("/v1/models/%0d%0aX:y", "/v1/models/../../hidden", "/;hidden", "/hidden?\xff", "/%c0%ae%c0%ae/hidden", "/\t"),
    ):
        sent = b"GET %b HTTP/1.1\r\n%b\r\n" % (target.encode("latin-1"), AUTHORIZED)
        yield target, RawCase(sent, not_found)
    yield (
        "CONNECT",
        RawCase(b"CONNECT evil.example:443 HTTP/1.1\r\n" + AUTHORIZED + b"\r\n" + HIDDEN, frozenset({400, 404, 405})),
    )
    yield (
        "CONNECT path",
        RawCase(b"CONNECT /v1/models HTTP/1.1\r\n" + AUTHORIZED + b"\r\n" + HIDDEN, frozenset({400, 405})),
    )


def versions() -> Iterator[tuple[str, RawCase]]:
    """Yield other versions and other protocols."""
    for line in (
        *(
            "GET /v1/models",
            "GET /v1/models\r\n",
            "GET /v1/models HTTP/0.9",
            "GET /v1/models HTTP/2.0",
            "GET /v1/models HTTP/3",
        ),
        *("GET /v1/models HTTP/1.2", "GET /v1/models HTTP/9.9", "GET /v1/models HTTP/11.1", "GET /v1/models HTTP/1.10"),
        *("GET /v1/models HTTP/1", "GET /v1/models http/1.1", "GET /v1/models HTTPS/1.1", "GET /v1/models HTTP/-1.1"),
        *(
            "GET /v1/models HTTP 1.1",
            "GET  /v1/models HTTP/1.1",
            "GET\t/v1/models\tHTTP/1.1",
            "GET /v1/models HTTP/1.1 x",
        ),
        *(
            "/v1/models HTTP/1.1",
            "HTTP/1.1 200 OK",
            "GET HTTP/1.1",
            "GET /v1/models HTTP/1.1\0",
            "RTSP/1.0",
            "ICY 200 OK",
        ),
    ):
        sent = f"{line}\r\n".encode() + AUTHORIZED + b"\r\n"
        served = {200} if line.split() == ["GET", "/v1/models", "HTTP/1.1"] else set()  # more blanks than one
        yield line.strip(), RawCase(sent, frozenset({CLOSES, 400, 404, 505} | served), 1)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    settings = b"\0\0\0\x04\0\0\0\0\0"
    yield "HTTP/2 with settings", RawCase(preface + settings, frozenset({400, 505}))
    yield "HTTP/2 after a request", RawCase(GET + b"\r\n" + preface + settings, EITHER, 2)
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n\r\n"
    yield "h2c and HTTP/2 at once", RawCase(GET + offer + preface + settings, EITHER, 2)
    for name, sent in {
        "TLS": b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + b"\x01" * 160,
        "SSH": b"SSH-2.0-x\r\n",
        "SMTP": b"EHLO x\r\nMAIL FROM:<a@b>\r\n",
        "Redis": b"*1\r\n$4\r\nPING\r\n",
        "PROXY 1": b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n" + GET + b"\r\n",
        "PROXY 2": b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + b"\x7f\0\0\1" * 3 + GET + b"\r\n",
        "answer": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        "random": bytes(range(256)) * 8,
        "all ones": b"\xff" * 4096,
    }.items():
        yield name, RawCase(sent, frozenset({CLOSES, 400}))


def hosts() -> Iterator[tuple[str, RawCase]]:
    """Yield hosts that are several, or none."""
    for name, lines in {
        "none": b"",
        "twice": b"Host: localhost\r\nHost: evil.example\r\n",
        "folded": b"Host: localhost\r\n evil.example\r\n",
        "with a path": b"Host: localhost/hidden\r\n",
        "with a user": b"Host: a@localhost\r\n",
        "with a blank": b"Host: local host\r\n",
        "with a comma": b"Host: localhost, evil.example\r\n",
        "with a CR": b"Host: localhost\revil.example\r\n",
        "with a NUL": b"Host: localhost\0evil.example\r\n",
        "blank before colon": b"Host : localhost\r\n",
        "huge": b"Host: " + b"a" * 70_000 + b"\r\n",
    }.items():
        sent = b"GET /hidden HTTP/1.1\r\n%bAuthorization: Bearer %b\r\n\r\n" % (lines, KEY.encode())
        yield name, RawCase(sent, frozenset({400, 404, 431}))


def sequences() -> Iterator[tuple[str, RawCase]]:
    """Yield several requests in one piece: each is answered in its turn or not at all."""
    yield "pipelined", RawCase((GET + b"\r\n") * 20, frozenset({200}), 20)
    yield "pipelined behind a close", RawCase(GET + b"Connection: close\r\n\r\n" + HIDDEN, frozenset({200}))
    yield "pipelined behind HTTP/1.0", RawCase(GET.replace(b"1.1", b"1.0") + b"\r\n" + HIDDEN, frozenset({200}))
    yield (
        "pipelined behind a websocket",
        RawCase(
            GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n", frozenset({400, 426})
        ),
    )
    yield "nonsense behind a request", RawCase(GET + b"\r\n\x01\x02\x03\r\n\r\n" + HIDDEN, EITHER, 2)
    yield (
        "expectation that is unknown",
        RawCase(
            POST + b"Expect: 200-maybe\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY, frozenset({200, 400, 417})
        ),
    )
