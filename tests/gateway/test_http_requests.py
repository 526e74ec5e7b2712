"""Requests byte by byte: what the server under the gateway serves, and what it refuses."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from typing import Any

import pytest

from service.gateway.clients import ClientRegistry
from tests.gateway.refused_requests import REFUSED
from tests.gateway.upstream import eventually, serve_gateway
from tests.gateway.wire import CHUNKED, GET, POST, Wire, answer, echo, echoed, run, statuses

OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"


@pytest.mark.parametrize("cut", [False, True])
def test_upgrade_offer_is_ignored_and_the_body_is_read(cut: bool) -> None:
    """Clients of Java offer h2c on each first request; the connection goes on as it is."""
    request = POST + OFFER + b"Content-Length: 5\r\n\r\nhello"

    async def work(wire: Wire) -> None:
        pieces = [request[i : i + 1] for i in range(len(request))] if cut else [request + request + GET]
        got = await wire.ask(*pieces, pause_s=0.001)
        assert statuses(got) == [200] if cut else [200, 200, 200]
        body = json.loads(re.findall(rb"\{.*?\}", got)[0])
        assert (body["method"], body["body"]) == ("POST", "hello")
        assert ["upgrade", "h2c"] in body["headers"]

    run(work)


def test_upgrade_offer_on_a_chunked_body_is_ignored() -> None:
    """The body is not taken for the other protocol."""

    async def work(wire: Wire) -> None:
        got = await wire.ask(POST + OFFER + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", GET)
        assert statuses(got) == [200, 200]
        assert b'"body": "hello"' in got

    run(work)


def test_websocket_handshake_reaches_the_application_as_a_get() -> None:
    """The application answers 426; the server knows no websockets."""

    async def work(wire: Wire) -> None:
        head = (
            b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\n"
        )
        got = await wire.ask(head)
        assert statuses(got) == [200]
        assert ["upgrade", "websocket"] in echoed(got)["headers"]

    run(work)


def test_pipelined_requests_are_answered_in_order() -> None:
    """The first answer takes longest; forty requests come in one piece."""

    async def slow_first(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.2 if scope["path"] == "/0" else 0)
        await echo(scope, receive, send)

    async def work(wire: Wire) -> None:
        requests = [b"POST /%d HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi" % number for number in range(40)]
        got = await wire.ask(b"".join(requests))
        assert [json.loads(found)["path"] for found in re.findall(rb"\{.*?\}", got)] == [f"/{n}" for n in range(40)]

    run(work, slow_first)


def test_pipelined_requests_without_end_close_the_connection_after_some() -> None:
    """Thousands of requests in one read hold no memory without bound."""

    async def work(wire: Wire) -> None:
        got = await wire.ask(GET * 2000)
        assert 250 < len(statuses(got)) < 300
        assert got.count(b"connection: close") == 1

    run(work)


def test_chunked_body_is_whole_and_its_trailers_are_no_headers() -> None:
    """A key in a trailer must not admit, on this request or the next."""

    async def work(wire: Wire) -> None:
        chunks = b"3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\nAuthorization: Bearer k\r\nX-B: c\r\n\r\n"
        got = await wire.ask(CHUNKED + chunks + GET, GET)
        assert statuses(got) == [200, 200, 200]
        assert b'"body": "hello"' in got
        assert b"uthorization" not in got
        assert b"x-b" not in got

    run(work)


def test_expectation_is_answered_once_the_application_reads() -> None:
    """The body is sent after `100 Continue`; an application that does not read answers at once."""

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, b"no", 401)

    async def work(wire: Wire) -> None:
        async with wire.connection() as (reader, writer):
            writer.write(POST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"hello")
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")

    async def refused(wire: Wire) -> None:
        got = await wire.ask(POST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        assert statuses(got) == [401]
        assert b"connection: close" in got

    run(work)
    run(refused, refuse)


def test_head_request_has_the_headers_and_no_body() -> None:
    """The connection goes on."""

    async def work(wire: Wire) -> None:
        got = await wire.ask(GET.replace(b"GET", b"HEAD") + GET)
        head, _, rest = got.partition(b"\r\n\r\n")
        assert re.search(rb"content-length: [1-9]", head)
        assert rest.startswith(b"HTTP/1.1 200")

    run(work)


def test_http_1_0_gets_an_answer_that_ends_with_the_connection() -> None:
    """No `Host` is needed, and an answer without a length is not chunked."""

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for more in (True, False):
            await send({"type": "http.response.body", "body": b"piece ", "more_body": more})

    async def work(wire: Wire) -> None:
        got = await wire.ask(b"GET /a HTTP/1.0\r\n\r\n")
        assert got.endswith(b"connection: close\r\n\r\npiece piece ")

    run(work, stream)


def test_date_is_there_once_and_connections_are_kept() -> None:
    """RFC 9110, section 6.6.1; `Keep-Alive` tells clients how long an idle connection stays."""

    async def work(wire: Wire) -> None:
        got = await wire.ask(GET)
        assert len(re.findall(rb"\r\ndate: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\r\n", got)) == 1
        assert b"\r\nconnection: keep-alive\r\nkeep-alive: timeout=619\r\n" in got

    run(work)


@pytest.mark.parametrize(
    ("target", "path", "query", "host"),
    [
        (b"/a%2Fb?c=d%20e", "/a/b", "c=d%20e", "x"),
        (b"http://other:81/a?b", "/a", "b", "other:81"),
        (b"http://other", "/", "", "other"),
        (b"/", "/", "", "x"),
        (b"//a", "//a", "", "x"),
    ],
)
def test_target_is_split_into_path_and_query(target: bytes, path: str, query: str, host: str) -> None:
    """A whole URL, as a proxy gets it, names the host itself."""

    async def work(wire: Wire) -> None:
        found = echoed(await wire.ask(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % target))
        assert (found["path"], found["query"]) == (path, query)
        assert [value for name, value in found["headers"] if name == "host"] == [host]

    run(work)


# Requests that are refused


@pytest.mark.parametrize("case", REFUSED)
def test_request_that_is_ambiguous_or_no_http_is_400_and_the_last(case: str) -> None:
    """What two servers could read differently never reaches the application, nor does what follows it."""
    seen: list[str] = []

    async def note(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])
        await echo(scope, receive, send)

    async def work(wire: Wire) -> None:
        got = await wire.ask(REFUSED[case] + b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n")
        assert statuses(got) == [400]
        assert b"\r\nconnection: close\r\n" in got
        assert json.loads(got.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
        assert seen == []

    run(work, note)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"GET /\r\n\r\n", 505),
        (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 200_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 200_000, 431),
        (b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 25_000 + b"\r\n", 431),
        (CHUNKED + b"1;" + b"a" * 200_000, 431),
        (CHUNKED + b"1\r\na\r\n0\r\nA: " + b"a" * 200_000, 431),
        (CHUNKED + b"1\r\na\r\n0\r\n" + b"A: b\r\n" * 50_000, 431),
        (b"\r\n" * 100_000, 431),
    ],
)
def test_request_of_another_kind_or_size_is_refused_by_its_status(request_: bytes, status: int) -> None:
    """The client reads the answer, although it has more to send."""

    async def work(wire: Wire) -> None:
        assert statuses(await wire.ask(request_, b"more" * 50_000)) == [status]

    run(work)


def test_head_of_the_limit_after_a_large_body_in_one_piece_is_served() -> None:
    """Bytes of a body do not count as those of a head."""

    async def work(wire: Wire) -> None:
        large = POST + b"Content-Length: 200000\r\n\r\n" + b"a" * 200_000
        got = await wire.ask(large + GET[:20], GET[20:] + large + GET)
        assert statuses(got) == [200] * 4

    run(work)


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions"])
def test_refusal_has_the_shape_of_the_paths_protocol(path: str) -> None:
    """Anthropic's clients read `type` and `request_id`."""

    async def work(wire: Wire) -> None:
        got = await wire.ask(f"POST {path} HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n".encode())
        body = json.loads(got.partition(b"\r\n\r\n")[2])
        assert (body.get("type") == "error") == (path == "/v1/messages")
        assert "2 Host headers" in body["error"]["message"]

    run(work)


def test_request_that_is_invalid_after_others_is_refused_after_their_answers() -> None:
    """Answers stay in order."""

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.1)
        await echo(scope, receive, send)

    async def work(wire: Wire) -> None:
        assert statuses(await wire.ask(GET + GET + b"nonsense\r\n\r\n")) == [200, 200, 400]

    run(work, slow)


def test_body_that_turns_out_invalid_is_refused_and_the_application_told() -> None:
    """The application sees a client that left, and nothing of it is sent."""
    ends: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        while message["type"] == "http.request":
            message = await receive()
        ends.append(message["type"])
        await answer(send, b"never")

    async def work(wire: Wire) -> None:
        got = await wire.ask(CHUNKED + b"3\r\nabc\r\n", b"zz\r\n")
        assert statuses(got) == [400]
        assert ends == ["http.disconnect"]

    run(work, app)


def test_trailer_with_a_key_does_not_admit() -> None:
    """The gateway itself: a key after the body is no key."""
    keys = {hashlib.sha256(b"a-key").hexdigest(): "alice"}

    async def main() -> None:
        async with serve_gateway(ClientRegistry(keys)) as gateway:
            wire = Wire(int(gateway.url.rpartition(":")[2]))
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            got = await wire.ask(head + b"2\r\n{}\r\n0\r\nAuthorization: Bearer a-key\r\n\r\n")
            assert statuses(got) == [401]
            await eventually(lambda: len(gateway.lines) == 1)

    asyncio.run(main())
