"""Ends of answers and connections, as the gateway's HTTP client takes them, on both event loops that it runs on."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import struct
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import uvloop

from service.gateway.http_client import connections as connections_module
from service.gateway.http_client.answer import EngineConnectionError
from service.gateway.http_client.connection import Connection
from service.gateway.http_client.connections import Connections
from tests.gateway.scripted_server import GET, OK, listening, sends
from tests.gateway.upstream import eventually
from tests.unit.tls import self_signed

NewLoop = Callable[[], asyncio.AbstractEventLoop]
both_loops = pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])


def run_on(new_loop: NewLoop, work: Callable[[], Awaitable[None]]) -> None:
    """Run on such a loop, for 10 s at most."""

    async def within() -> None:
        async with asyncio.timeout(10):
            await work()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(within())


@both_loops
def test_client_keeps_no_connection_on_which_bytes_of_its_request_are_unsent(new_loop: NewLoop) -> None:
    """An engine that answered without reading them would take them for the next request, or resets it."""

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b"Content-Length: 2\r\n\r\nhi")
        await asyncio.sleep(60)

    async def work() -> None:
        async with listening(early) as origin, Connections(60) as connections:
            answer = await connections.request(origin, GET + b"x" * 20_000_000)
            assert (await answer.read_all(9), connections.idle) == (b"hi", 0)

    run_on(new_loop, work)


@both_loops
@pytest.mark.parametrize("head", [b"", OK + b"\r\n", OK + b"Content-Length: 2\r\n\r\n"])
def test_client_ends_where_the_engine_half_closes_and_reads_nothing(new_loop: NewLoop, head: bytes) -> None:
    """While a body is unsent too: nobody will ever read it."""
    pieces: list[memoryview | bytes] = [b"x" * 100_000] * 1000

    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head)
        writer.write_eof()
        await asyncio.sleep(60)

    async def work() -> None:
        async with listening(half) as origin, Connections(60) as connections:
            if head == OK + b"\r\n":
                answer = await connections.request(origin, GET, pieces)
                assert (await answer.read_all(9), connections.idle) == (b"", 0)
            else:
                with pytest.raises(EngineConnectionError, match="closed the connection") as told:
                    await (await connections.request(origin, GET, pieces)).read_all(9)
                assert told.value.has_answered == bool(head)

    run_on(new_loop, work)


@both_loops
def test_client_takes_no_body_that_a_reset_cuts_for_whole(new_loop: NewLoop) -> None:
    """Even where the end of the connection is that of the body."""

    async def resets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await sends(OK + b"\r\nhel")(reader, writer)
        taken: socket.socket = writer.get_extra_info("socket")
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def work() -> None:
        async with listening(resets) as origin, Connections(60) as connections:
            answer = await connections.request(origin, GET)
            with pytest.raises(EngineConnectionError, match="reset"):
                await answer.read_all(9)

    run_on(new_loop, work)


@both_loops
def test_client_takes_no_body_for_whole_whose_connection_it_closed_itself(new_loop: NewLoop) -> None:
    """Where the gateway stops, the answers that run break off."""

    async def work() -> None:
        async with listening(sends(OK + b"\r\nhel", keeps=True)) as origin:
            async with Connections(60) as connections:
                answer = await connections.request(origin, GET)
                assert await answer.read() == b"hel"
            with pytest.raises(EngineConnectionError):
                await answer.read()

    run_on(new_loop, work)


@both_loops
@pytest.mark.parametrize("notifies", [True, False])
def test_client_over_tls_takes_a_body_for_whole_where_the_engine_ended_it(
    new_loop: NewLoop, notifies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its close_notify says so; an end of TCP without one may be anybody's: RFC 9112, section 9.8."""
    made = self_signed(tmp_path)
    trusting = ssl.create_default_context(cafile=str(made.file))
    monkeypatch.setattr(connections_module, "_tls_context", lambda: trusting)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await sends(OK + b"\r\nhello")(reader, writer)
        if not notifies:
            await asyncio.sleep(0.05)
            taken: socket.socket = writer.get_extra_info("socket")
            with socket.socket(fileno=socket.dup(taken.fileno())) as copy:
                copy.shutdown(socket.SHUT_WR)
            await asyncio.sleep(60)

    async def work() -> None:
        async with listening(serve, made.server_context()) as origin, Connections(60) as connections:
            answer = await connections.request(origin, GET)
            if notifies:
                assert await answer.read_all(9) == b"hello"
            else:
                with pytest.raises(EngineConnectionError):
                    await answer.read_all(9)

    run_on(new_loop, work)


def test_client_connection_that_ended_is_freed_without_the_garbage_collector() -> None:
    """Each answer with `Connection: close`, and each client that leaves, ends one."""
    ended: list[weakref.ref[Connection]] = []

    async def run() -> None:
        closing = OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nhi"
        unending = OK + b"Content-Length: 5\r\n\r\nhe"
        for piece in (closing, unending):
            async with listening(sends(piece, keeps=True)) as origin, Connections(60) as connections:
                answer = await connections.request(origin, GET)
                ended.append(weakref.ref(next(iter(connections._open))))
                if piece is closing:
                    await answer.read_all(9)
                answer.close()
                del answer
                await eventually(lambda: ended[-1]() is None)

    gc.disable()
    try:
        asyncio.run(run())
    finally:
        gc.enable()


def test_client_takes_no_trailer_for_a_header() -> None:
    """The headers are those of the head, also once the whole body is here."""

    async def run() -> None:
        served = sends(
            OK + b"Transfer-Encoding: chunked\r\nA: b\r\n\r\n2\r\nhi\r\n0\r\nX-Trailer: c\r\n\r\n", keeps=True
        )
        async with listening(served) as origin, Connections(60) as connections:
            answer = await connections.request(origin, GET)
            assert await answer.read_all(9) == b"hi"
            assert answer.headers == [(b"transfer-encoding", b"chunked"), (b"a", b"b")]
            assert connections.idle == 1

    asyncio.run(run())


def test_client_that_passes_on_more_than_it_buffers_goes_on_reading() -> None:
    """Reading pauses while the piece is there, and no longer."""

    async def run() -> None:
        transport = Mock(is_closing=lambda: False)
        connection = Connection(asyncio.get_running_loop(), Mock(), Mock())
        connection.connection_made(transport)
        answer = connection.begin(GET)
        connection.data_received(OK + b"Content-Length: 300000\r\n\r\n")
        taken: list[bytes] = []

        def pass_on(piece: bytes) -> bool:
            taken.append(piece)
            return True

        reading = asyncio.ensure_future(answer.read(pass_on))
        await asyncio.sleep(0)
        connection.data_received(b"x" * 200_000)
        assert (len(taken[0]), transport.pause_reading.call_count) == (200_000, 1)
        assert transport.resume_reading.call_count == 1
        reading.cancel()

    asyncio.run(run())
