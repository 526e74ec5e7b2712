"""The gateway's HTTP client: what it takes for an answer, what it does with connections, and what it sends."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from unittest.mock import Mock

import pytest

from service.gateway.http_client import connections as connections_module
from service.gateway.http_client.answer import Answer, ConnectError, EngineConnectionError
from service.gateway.http_client.connection import Connection
from service.gateway.http_client.connections import Connections, Origin
from service.gateway.http_client.head import header_lines, request_head, request_target
from service.in_engine.vllm_service.http_contract import HEAD_LIMIT
from tests.gateway.scripted_server import GET, OK, Serve, listening, sends
from tests.gateway.upstream import eventually
from tests.unit.tls import self_signed

INTERIM = b"HTTP/1.1 103 Early Hints\r\nA: b\r\n\r\n"


def asked(serve: Serve) -> tuple[int, bytes, int]:
    """Return status and body of an answer, and how many connections are kept after it."""

    async def run() -> tuple[int, bytes, int]:
        async with listening(serve) as origin, Connections(60) as connections, asyncio.timeout(10):
            answer = await connections.request(origin, GET)
            body = await answer.read_all(1 << 30)
            return answer.status, body, connections.idle

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("pieces", "found", "kept"),
    [
        ([OK + b"Content-Length: 5\r\n\r\nhello"], b"hello", 1),
        ([OK + b"Content-Length: 0\r\n\r\n"], b"", 1),
        ([bytes([one]) for one in OK + b"Content-Length: 5\r\n\r\nhello"], b"hello", 1),
        ([OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n", b"2;x=y\r\nlo\r\n0\r\nA: b\r\n\r\n"], b"hello", 1),
        ([OK + b"Transfer-Encoding: chunked \r\n\r\n2\r\nhi\r\n0\r\n\r\n"], b"hi", 1),
        ([OK + b"\r\nhel", b"lo"], b"hello", 0),  # its end is that of the connection
        ([OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello"], b"hello", 0),
        ([b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello"], b"hello", 0),
        ([b"HTTP/1.1 100 Continue\r\n\r\n", INTERIM + OK + b"Content-Length: 2\r\n\r\nhi"], b"hi", 1),
        ([OK + b"Content-Length: 5\r\n\r\nhello" + OK + b"Content-Length: 1\r\n\r\nx"], b"hello", 0),
    ],
)  # fmt: skip
def test_client_reads_bodies_of_every_framing(pieces: list[bytes], found: bytes, kept: int) -> None:
    """Of a length, in chunks, up to the end; only a connection whose answer ends on its own is kept."""
    assert asked(sends(*pieces, keeps=b"OK\r\n\r\n" not in pieces[0])) == (200, found, kept)


@pytest.mark.parametrize("status", [204, 304])
def test_client_expects_no_body_where_there_is_none(status: int) -> None:
    """These have none, whatever their headers are."""
    assert asked(sends(b"HTTP/1.1 %d X\r\n\r\n" % status, keeps=True)) == (status, b"", 1)


@pytest.mark.parametrize(
    ("pieces", "has_begun"),
    [
        ([b""], False),
        ([b"HTTP/1.1 200 O"], False),
        ([b"SSH-2.0-x\r\n"], False),
        ([b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n"], False),
        ([OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"], False),
        ([OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"], False),
        ([OK + b"Transfer-Encoding: gzip\r\n\r\nhello"], False),
        ([OK + b"A: " + b"x" * HEAD_LIMIT + b"\r\n\r\n"], False),
        ([OK + b"A: b\r\n" * HEAD_LIMIT], False),
        ([OK + b"Content-Length: 5\r\n\r\nhell"], True),
        ([OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"], True),
        ([OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n"], True),
        ([OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", *[b"A: %b\r\n" % (b"x" * 60000)] * 40], True),
    ],
)  # fmt: skip
def test_client_takes_no_answer_that_is_incomplete_or_invalid(pieces: list[bytes], has_begun: bool) -> None:
    """Before the head is here the request fails, then the reading of its body; and no connection is kept."""

    async def run() -> None:
        async with listening(sends(*pieces)) as origin, Connections(60) as connections, asyncio.timeout(10):
            answer: Answer | None = None
            with pytest.raises(EngineConnectionError) as told:
                answer = await connections.request(origin, GET)
                await answer.read_all(1 << 30)
            assert told.value.has_answered == any(pieces)
            assert ((answer is not None), connections.idle) == (has_begun, 0)

    asyncio.run(run())


def test_client_uses_a_kept_connection_again_and_says_so() -> None:
    """The one that was used last; a request on it is told from one on a new connection."""
    connected = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connected
        connected += 1
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(OK + b"Content-Length: 2\r\n\r\nhi")

    async def run() -> None:
        async with listening(serve) as origin, Connections(60) as connections:
            reused: list[bool] = []
            for _ in range(3):
                answer = await connections.request(origin, GET, on_reuse=lambda: reused.append(True))
                assert await answer.read_all(100) == b"hi"
            assert (connected, len(reused)) == (1, 2)
            several = [connections.request(origin, GET) for _ in range(5)]
            for answer in await asyncio.gather(*several):
                await answer.read_all(100)
            assert (connected, connections.idle) == (5, 5)

    asyncio.run(run())


def test_client_drops_connections_that_were_idle_for_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine closes them soon: neither is a request sent on one, nor does it stay open."""
    monkeypatch.setattr(connections_module, "_SWEEP_S", 0.05)
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await sends(OK + b"Content-Length: 2\r\n\r\nhi", keeps=True)(reader, writer)
        gone.set()

    async def run(kept_s: float) -> None:
        async with listening(serve) as origin, Connections(kept_s) as connections, asyncio.timeout(10):
            for _ in range(2):
                answer = await connections.request(origin, GET, on_reuse=pytest.fail)
                assert await answer.read_all(100) == b"hi"
            await gone.wait()
            await eventually(lambda: connections.idle == 0)

    asyncio.run(run(0.0))
    gone.clear()
    monkeypatch.setattr(connections_module, "_SWEEP_S", 60)

    async def swept() -> None:
        async with listening(serve) as origin, Connections(0.1) as connections:
            await (await connections.request(origin, GET)).read_all(100)
            assert connections.idle == 1
            await asyncio.sleep(0.15)
            connections._close_old()
            assert connections.idle == 0

    asyncio.run(swept())


def test_client_closes_a_kept_connection_on_which_something_comes_unasked() -> None:
    """It would be taken for the answer to the next request."""

    async def unasked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await sends(OK + b"Content-Length: 2\r\n\r\nhi")(reader, writer)
        await asyncio.sleep(0.05)
        writer.write(OK + b"Content-Length: 4\r\n\r\nevil")
        await reader.read()

    async def run() -> None:
        async with listening(unasked) as origin, Connections(60) as connections, asyncio.timeout(10):
            assert await (await connections.request(origin, GET)).read_all(100) == b"hi"
            await asyncio.sleep(0.1)
            assert await (await connections.request(origin, GET)).read_all(100) == b"hi"

    asyncio.run(run())


def test_client_closes_the_connection_of_an_answer_that_is_not_read_to_its_end() -> None:
    """So the engine learns that nobody waits for it; also where the request is cancelled before the head."""

    async def run(*pieces: bytes) -> None:
        gone = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await sends(*pieces, keeps=True)(reader, writer)
            finally:
                gone.set()

        async with listening(serve) as origin, Connections(60) as connections, asyncio.timeout(10):
            if pieces:
                answer = await connections.request(origin, GET)
                answer.close()
            else:
                asking = asyncio.ensure_future(connections.request(origin, GET))
                await asyncio.sleep(0.05)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
            await gone.wait()
            assert connections.idle == 0

    asyncio.run(run(OK + b"Content-Length: 5\r\n\r\nhe"))
    asyncio.run(run())


def test_client_without_a_listener_or_a_host_says_that_nobody_saw_the_request() -> None:
    """Such a request may be sent again."""

    async def run() -> None:
        async with Connections(60) as connections:
            for url in ("http://127.0.0.1:1", "http://no-such-host.invalid"):
                with pytest.raises(ConnectError):
                    await connections.request(Origin.of(url), GET)

    asyncio.run(run())


def test_client_that_reads_slowly_holds_the_engine_back() -> None:
    """What nobody takes stays in the engine's buffers."""
    written = 0

    async def floods(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b"Content-Length: 100000000\r\n\r\n")
        while written < 100_000_000:
            writer.write(b"x" * 100_000)
            await writer.drain()
            written += 100_000

    async def run() -> None:
        async with listening(floods) as origin, Connections(60) as connections, asyncio.timeout(30):
            answer = await connections.request(origin, GET)
            before = -1
            while written != before:
                before = written
                await asyncio.sleep(0.1)
            assert written < 20_000_000  # the kernel's buffers
            assert answer._buffered < 2_000_000
            size = 0
            while piece := await answer.read():
                size += len(piece)
            assert (size, connections.idle) == (100_000_000, 1)

    asyncio.run(run())


def test_client_reads_on_a_connection_whose_last_answer_held_the_engine_back() -> None:
    """Its end may arrive with the bytes that were too many; the next request on it waited for ever."""

    async def run() -> None:
        transport, freed = Mock(is_closing=lambda: False, get_write_buffer_size=lambda: 0), Mock()
        connection = Connection(asyncio.get_running_loop(), freed, Mock())
        connection.connection_made(transport)
        for turn in (1, 2):
            answer = connection.begin(GET)
            connection.data_received(OK + b"Content-Length: 200000\r\n\r\n" + b"x" * 200_000)
            assert transport.pause_reading.call_count == transport.resume_reading.call_count == turn
            assert (freed.call_count, len(await answer.read())) == (turn, 200_000)

    asyncio.run(run())


def test_client_passes_pieces_on_in_their_order_whoever_takes_them() -> None:
    """Some are taken as they arrive; those that are refused come from `read`, and none overtakes another."""

    async def run() -> None:
        connection = Connection(asyncio.get_running_loop(), Mock(), Mock())
        connection.connection_made(Mock(is_closing=lambda: False))
        answer = connection.begin(GET)
        connection.data_received(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        taken: list[bytes] = []
        takes = True

        def pass_on(piece: bytes) -> bool:
            if takes:
                taken.append(piece)
            return takes

        reading = asyncio.ensure_future(answer.read(pass_on))
        await asyncio.sleep(0)
        connection.data_received(b"1\r\na\r\n1\r\nb\r\n")
        connection.data_received(b"1\r\nc\r\n")
        assert (taken, reading.done()) == ([b"ab", b"c"], False)
        takes = False
        connection.data_received(b"1\r\nd\r\n")
        takes = True
        connection.data_received(b"1\r\ne\r\n")  # takes what was refused too, since nobody has read it yet
        connection.data_received(b"1\r\nf\r\n0\r\n\r\n")
        assert (taken, await reading, await answer.read(pass_on)) == ([b"ab", b"c", b"de"], b"f", b"")

    asyncio.run(run())


def test_client_sends_a_long_body_as_fast_as_it_is_read() -> None:
    """All of it, in order; it waits in the caller's memory, not in a second copy."""
    body = bytes(range(256)) * 80_000
    pieces: list[memoryview | bytes] = [memoryview(body)[at : at + 100_000] for at in range(0, len(body), 100_000)]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(len(body)) == body
        writer.write(OK + b"Content-Length: 2\r\n\r\nhi")
        await reader.read()

    async def run() -> None:
        async with listening(serve) as origin, Connections(60) as connections, asyncio.timeout(30):
            answer = await connections.request(origin, GET, pieces)
            assert (await answer.read_all(9), connections.idle) == (b"hi", 1)

    asyncio.run(run())


@pytest.mark.parametrize("closes", [False, True])
def test_client_takes_an_error_that_comes_before_its_body_was_read(closes: bool) -> None:
    """The rest of the body is not sent, and the connection takes no further request."""
    pieces: list[memoryview | bytes] = [b"x" * 100_000] * 1000

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 X\r\nContent-Length: 3\r\n\r\nbig")
        await writer.drain()
        if closes:
            await reader.readexactly(1_000_000)
        else:
            await asyncio.sleep(60)

    async def run() -> None:
        async with listening(serve) as origin, Connections(60) as connections, asyncio.timeout(30):
            answer = await connections.request(origin, GET, pieces)
            assert (answer.status, await answer.read_all(9), connections.idle) == (413, b"big", 0)

    asyncio.run(run())


def test_client_whose_engine_ends_while_a_body_is_sent_fails() -> None:
    """It does not wait for buffers that nobody empties."""
    pieces: list[memoryview | bytes] = [b"x" * 100_000] * 1000

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(100_000)
        writer.transport.abort()

    async def run() -> None:
        async with listening(serve) as origin, Connections(60) as connections, asyncio.timeout(30):
            with pytest.raises(EngineConnectionError) as told:
                await connections.request(origin, GET, pieces)
            assert not told.value.has_answered

    asyncio.run(run())


def test_client_speaks_tls_and_checks_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at Modal: the name must be the certificate's, and its authority known."""
    made = self_signed(tmp_path)
    body = b"x" * 1_000_000

    async def run() -> bytes:
        serve = sends(OK + b"Content-Length: %d\r\n\r\n" % len(body), body, keeps=True)
        async with (
            listening(serve, made.server_context()) as origin,
            Connections(60) as connections,
            asyncio.timeout(10),
        ):
            answer = await connections.request(origin, GET)
            found = await answer.read_all(1 << 30)
            assert connections.idle == 1
            return found

    with pytest.raises(ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        asyncio.run(run())
    trusting = ssl.create_default_context(cafile=str(made.file))
    monkeypatch.setattr(connections_module, "_tls_context", lambda: trusting)
    assert asyncio.run(run()) == body


@pytest.mark.parametrize("value", ["a\r\nX: y", "a\nb", "a\rb", "a\0b", "\r\n"])
def test_head_with_a_line_break_in_a_header_is_never_sent(value: str) -> None:
    """A header's value would be a header, or a request, of its own."""
    with pytest.raises(ValueError, match="line break"):
        request_head("GET", "/", header_lines({"A": value}), 1)


def test_target_of_a_request_is_one_word() -> None:
    """Whatever a path holds."""
    assert request_target("/v1/a b\r\nc?d#é", "x=%20") == "/v1/a%20b%0D%0Ac%3Fd%23%C3%A9?x=%20"
    assert request_target("/v1/responses/resp_1-a/cancel", "") == "/v1/responses/resp_1-a/cancel"


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://127.0.0.1:8000", Origin(False, "127.0.0.1", 8000, "127.0.0.1:8000")),
        ("https://a--b.modal.run/x?y", Origin(True, "a--b.modal.run", 443, "a--b.modal.run")),
        ("http://[::1]:80/", Origin(False, "::1", 80, "[::1]:80")),
        ("https://user:word@Host/", Origin(True, "host", 443, "Host")),
    ],
)
def test_origin_of_a_url_has_host_and_port(url: str, origin: Origin) -> None:
    """And the authority without a user."""
    assert Origin.of(url) == origin


@pytest.mark.parametrize("url", ["", "ftp://x", "/path", "https:///x"])
def test_origin_of_what_is_no_url_is_refused(url: str) -> None:
    """Such as what a redirect names."""
    with pytest.raises(ValueError, match="no URL"):
        Origin.of(url)
