"""Connections: answers before the body, times, bounds, clients that leave, answers that break off, IPv6, the end."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from service.gateway.http_server.connection import Connection
from service.gateway.http_server.exchange import ON_LEAVE
from service.gateway.http_server.limits import Limits, Shared
from service.gateway.http_server.parser import RequestParser
from service.gateway.http_server.server import HttpServer
from tests.gateway.upstream import eventually
from tests.gateway.wire import (
    GET,
    MIB,
    POST,
    QUICK,
    Answering,
    Wire,
    answer,
    echo,
    echoed,
    run,
    statuses,
    with_lifespan,
)

# Answers that come before the body


def test_answer_to_a_body_that_is_still_written_is_read() -> None:
    """The client writes 40 MB before it reads; RFC 9112, section 9.6."""

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, b"too large", 413)

    async def work(wire: Wire) -> None:
        async with wire.connection() as (reader, writer):
            writer.write(POST + b"Content-Length: 41943040\r\n\r\n")
            for _ in range(40):
                writer.write(b"a" * MIB)
                await writer.drain()
            async with asyncio.timeout(5):
                got = await reader.read()
        assert statuses(got) == [413]
        assert b"connection: close" in got

    run(work, refuse)


def test_answer_to_a_short_body_that_is_not_read_keeps_the_connection() -> None:
    """Such a body is dropped, and the next request is answered."""

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, b"no", 401)

    async def work(wire: Wire) -> None:
        got = await wire.ask(POST + b"Content-Length: 5\r\n\r\nhe", b"llo" + GET)
        assert statuses(got) == [401, 401]
        assert b"connection: close" not in got

    run(work, refuse)


def test_refused_client_that_never_stops_writing_is_cut_off() -> None:
    """It gets its answer, and its connection ends within the time for the rest."""

    async def work(wire: Wire) -> None:
        async with wire.connection() as (reader, writer):
            writer.write(b"nonsense\r\n\r\n")
            assert b" 400 " in await reader.readline()
            began = asyncio.get_running_loop().time()
            with pytest.raises(ConnectionError):
                while True:
                    writer.write(b"a" * 1000)
                    await writer.drain()
                    await asyncio.sleep(0.01)
            assert asyncio.get_running_loop().time() - began < 5

    run(work, limits=QUICK)


# Times


@pytest.mark.parametrize(
    ("sent", "status"), [(b"", None), (GET, 200), (b"\r\n", None)], ids=["nothing", "a request", "an empty line"]
)
def test_connection_without_a_request_is_closed_in_time(sent: bytes, status: int | None) -> None:
    """A new one without a byte, and one that idles after its request."""

    async def work(wire: Wire) -> None:
        async with wire.connection() as (reader, writer):
            writer.write(sent)
            async with asyncio.timeout(5):
                got = await reader.read()
            assert statuses(got) == ([status] if status else [])

    run(work, limits=QUICK)


@pytest.mark.parametrize("before", [b"", GET])
def test_head_that_stalls_is_408(before: bytes) -> None:
    """Also one that arrives byte by byte, on a new connection and on one that was used."""

    async def work(wire: Wire) -> None:
        got = await wire.ask(before, *(b"GET /a HTTP/1.1"[i : i + 1] for i in range(15)), pause_s=0.15)
        assert statuses(got)[-1] == 408
        assert b"headers_too_slow" in got

    run(work, limits=QUICK)


@pytest.mark.parametrize(
    "piece",
    [
        b"GET /a HTTP/1.1\r\nHost: x\r\na: " + b"a" * 60_000,
        b"GET /a HTTP/1.1\r\nHost: x\r\n" + b"a:b\r\n" * 1000,  # 5 bytes each, and many times that in memory
        GET + b"GET /a?" + b"a" * 60_000,
        POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\na: " + b"a" * 60_000,
    ],
    ids=["value", "many headers", "second request", "trailer"],
)
def test_incomplete_heads_are_bounded_in_all(piece: bytes) -> None:
    """The oldest end; a head in two pieces is served meanwhile, and connections that are gone do not count."""
    limits = replace(QUICK, head_s=30.0, rest_s=30.0, keep_alive_s=30.0, all_heads_bytes=4 * MIB)

    async def refused(wire: Wire, count: int) -> list[int]:
        async with AsyncExitStack() as stack:
            readers = []
            for _ in range(count):
                reader, writer = await stack.enter_async_context(wire.connection())
                writer.write(piece)
                await writer.drain()
                readers.append(reader)
            assert statuses(await wire.ask(GET[:9], GET[9:])) == [200]
            return [number for number, reader in enumerate(readers) if b"too_many_bytes" in reader._buffer]  # type: ignore[attr-defined]

    async def work(wire: Wire) -> None:
        ended = await refused(wire, 100)
        assert ended == [*range(len(ended))]
        assert 20 < len(ended) < 80
        assert await refused(wire, 20) == []

    run(work, limits=limits)


def test_body_that_is_uploaded_is_no_incomplete_head() -> None:
    """Heads of 100 KB are complete, and their bodies have not begun."""
    limits = replace(QUICK, head_s=30.0, rest_s=30.0, keep_alive_s=30.0, all_heads_bytes=MIB)
    head = POST + b"a: " + b"a" * 100_000 + b"\r\nContent-Length: 1\r\n\r\n"

    async def work(wire: Wire) -> None:
        async with AsyncExitStack() as stack:
            uploads = [await stack.enter_async_context(wire.connection()) for _ in range(20)]
            for _, writer in uploads:
                writer.write(head)
                await writer.drain()
            assert statuses(await wire.ask(GET)) == [200]
            for reader, writer in uploads:
                writer.write(b"b")
                async with asyncio.timeout(5):
                    assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")

    run(work, limits=limits)


def test_answer_may_take_longer_than_all_idle_times() -> None:
    """No deadline of the server applies while the application answers."""

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(2.5)
        await echo(scope, receive, send)

    async def work(wire: Wire) -> None:
        got = await wire.ask(GET, pause_s=2.5)
        assert statuses(got) == [200]

    run(work, slow, QUICK)


def test_rest_of_a_body_that_never_comes_ends_the_connection() -> None:
    """The request was answered before its body; the connection waits for the rest in vain."""

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, b"no", 401)

    async def work(wire: Wire) -> None:
        async with wire.connection() as (reader, writer):
            writer.write(POST + b"Content-Length: 5\r\n\r\nhe")
            async with asyncio.timeout(5):
                assert statuses(await reader.read()) == [401]

    run(work, refuse, QUICK)


def test_client_that_does_not_read_is_cut_off() -> None:
    """The application waits meanwhile, and ends with the connection."""
    ended = asyncio.Event()

    async def flood(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            for _ in range(100):
                await send({"type": "http.response.body", "body": b"a" * MIB, "more_body": True})
        finally:
            ended.set()

    async def work(wire: Wire) -> None:
        async with wire.connection() as (reader, writer):
            writer.write(GET)
            await reader.readline()
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            async with asyncio.timeout(6):
                await ended.wait()

    run(work, flood, replace(QUICK, write_s=0.5))


# Connections


def test_connections_over_the_bound_replace_the_one_that_waits_longest() -> None:
    """Idle clients cannot keep others out; a request in flight is never cut."""
    go_on = asyncio.Event()

    async def hold(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/hold":
            await go_on.wait()
        await echo(scope, receive, send)

    async def work(wire: Wire) -> None:
        async with wire.connection() as (busy, writer), wire.connection() as (idle, _), wire.connection() as (late, _):
            writer.write(b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n")
            await asyncio.sleep(0.1)
            assert statuses(await wire.ask(GET)) == [200]
            assert await idle.read() == b""
            go_on.set()
            assert b" 200 " in await busy.readline()
            assert not late.at_eof()

    run(work, hold, Limits(connections=3))


def test_request_that_has_arrived_when_its_idle_connection_is_due_is_answered() -> None:
    """The server was busy with others and has not read it yet; the client has written all of it in time."""

    async def main() -> None:
        async with started(echo) as (server, port), Wire(port).connection() as (reader, writer):
            writer.write(GET)
            assert echoed(await reader.readuntil(b"}"))["path"] == "/a"
            due = asyncio.get_running_loop().time() + 2 * server._shared.limits.keep_alive_s
            writer.write(GET)  # reaches the kernel at once
            for connection in server._shared.connections:
                connection.check_deadlines(due)
            assert echoed(await reader.readuntil(b"}"))["path"] == "/a"
            for connection in server._shared.connections:
                connection.check_deadlines(due)
            assert await reader.read() == b""
            await server.stop(1)

    asyncio.run(main())


def test_idle_connection_is_closed_in_stages() -> None:
    """A request that crosses the close meets the end of the connection, no reset (RFC 9112, section 9.6); it counts."""
    late: list[None] = []

    async def main() -> None:
        async with (
            started(echo, limits=QUICK, on_late_request=lambda: late.append(None)) as (server, port),
            Wire(port).connection() as (reader, writer),
        ):
            writer.write(GET)
            async with asyncio.timeout(5):
                assert statuses(await reader.read()) == [200]
            assert late == []
            for _ in range(3):
                writer.write(GET)
                await writer.drain()
                await asyncio.sleep(0.05)
            await server.stop(0)

    asyncio.run(main())
    assert late == [None]


def test_connections_over_the_bound_spare_one_whose_request_has_arrived() -> None:
    """The one that waits longest has just sent a request, which is not read yet: the next is closed in its place."""

    async def main() -> None:
        async with started(echo, limits=Limits(connections=2)) as (server, port):
            wire = Wire(port)
            async with wire.connection() as (first, writer), wire.connection() as (second, _):
                await eventually(lambda: len(server._shared.waiting) == 2)
                writer.write(GET)
                connection = Connection(server._shared)
                connection.connection_made(asyncio.Transport({"sockname": None, "peername": None}))
                assert await second.read() == b""
                assert echoed(await first.readuntil(b"}"))["path"] == "/a"
                connection.connection_lost(None)
            await server.stop(1)

    asyncio.run(main())


def test_connections_over_the_bound_are_503_when_all_are_busy() -> None:
    """The client is told to come again."""
    go_on = asyncio.Event()

    async def hold(scope: Any, receive: Any, send: Any) -> None:
        await go_on.wait()
        await echo(scope, receive, send)

    async def work(wire: Wire) -> None:
        async with wire.connection() as (busy, writer):
            writer.write(GET)
            await asyncio.sleep(0.1)
            got = await wire.ask(GET)
            assert statuses(got) == [503]
            assert b"retry-after: 1" in got
            go_on.set()
            assert b" 200 " in await busy.readline()

    run(work, hold, Limits(connections=1))


@pytest.mark.parametrize(
    ("others", "refused"),
    [
        (["192.0.2.1"], True),
        (["::ffff:192.0.2.1"], True),
        (["192.0.2.2"], False),
        (["2001:db8::1", "2001:db8::2:0:0:1"], True),
        (["2001:db8::1", "2001:db8:0:1::1"], False),
        (["fe80::1%eth0", "fe80::2"], True),
        (["127.0.0.1"] * 3 + ["::1", "::ffff:127.0.0.1"], False),
    ],
)
def test_connections_of_one_address_are_bounded_but_not_on_this_machine(others: list[str], refused: bool) -> None:
    """A machine has all of its 64 bits of IPv6; a proxy on this machine serves everybody from one address."""

    class Client(asyncio.Transport):
        def __init__(self, host: str) -> None:
            super().__init__({"sockname": ("192.0.2.9", 80), "peername": (host, 1, 0, 0)})
            self.written, self.closed = b"", False

        def write(self, data: bytes | bytearray | memoryview) -> None:
            self.written += data

        def close(self) -> None:
            self.closed = True

    async def main() -> None:
        shared = Shared(echo, Limits(address_connections=1))
        hosts = others if len(others) > 1 else ["192.0.2.1", *others]
        clients = [Client(host) for host in hosts]
        connections = [Connection(shared) for _ in clients]
        for connection, client in zip(connections, clients, strict=True):
            connection.connection_made(client)
        assert [client.closed for client in clients] == [False] * (len(clients) - 1) + [refused]
        assert (b"too_many_connections" in clients[-1].written) == refused
        for connection in connections:
            connection.connection_lost(None)
        again = Connection(shared)
        again.connection_made(Client(hosts[-1]))
        assert not again._ignores

    asyncio.run(main())


def test_body_that_the_application_does_not_take_is_not_read() -> None:
    """A client that sends 64 MB is slowed down; 64 KiB and what one read brought are held."""
    go_on = asyncio.Event()
    most = 0

    async def late(scope: Any, receive: Any, send: Any) -> None:
        nonlocal most
        await go_on.wait()
        more = True
        while more:
            message = await receive()
            most, more = max(most, len(message["body"])), message["more_body"]
        await answer(send, b"ok")

    async def work(wire: Wire) -> None:
        async with wire.connection() as (reader, writer):
            writer.write(POST + b"Content-Length: %d\r\n\r\n" % (64 * MIB))
            sending = asyncio.ensure_future(_send(writer, 64))
            await asyncio.sleep(0.3)
            assert not sending.done()
            go_on.set()
            await sending
            assert b" 200 " in await reader.readline()
        assert most < MIB

    run(work, late)


async def _send(writer: asyncio.StreamWriter, mebibytes: int) -> None:
    for _ in range(mebibytes):
        writer.write(b"a" * MIB)
        await writer.drain()


@pytest.mark.parametrize("pipelined", [b"", GET])
@pytest.mark.parametrize("half", [False, True])
def test_client_that_leaves_is_noticed_while_the_application_only_sends(half: bool, pipelined: bytes) -> None:
    """At once, also with another request behind; a client that closes its sending side counts as gone."""
    gone = asyncio.Event()

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert (await receive())["type"] == "http.disconnect"
        gone.set()

    async def work(wire: Wire) -> None:
        async with wire.connection() as (reader, writer):
            writer.write(GET + pipelined)
            await reader.readline()
            if half:
                writer.write_eof()
            else:
                writer.close()
            async with asyncio.timeout(1):
                await gone.wait()

    run(work, stream)


# Answers that the application leaves incomplete


@pytest.mark.parametrize(
    ("failure", "status"), [(None, 500), (ValueError("a bug"), 500), (ConnectionError("lost"), None)], ids=str
)
def test_application_that_does_not_answer_ends_the_connection(failure: Exception | None, status: int | None) -> None:
    """With an error where it failed, and without where it breaks off on purpose."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if failure:
            raise failure

    async def work(wire: Wire) -> None:
        got = await wire.ask(GET + GET)
        assert statuses(got) == ([status] if status else [])

    run(work, app)


@pytest.mark.parametrize("headers", [[], [(b"content-length", b"10")]])
def test_answer_that_breaks_off_looks_incomplete(headers: list[tuple[bytes, bytes]]) -> None:
    """No last chunk is sent, and fewer bytes than were declared."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ConnectionError

    async def work(wire: Wire) -> None:
        got = await wire.ask(GET + GET)
        assert statuses(got) == [200]
        assert got.rstrip().endswith(b"half")

    run(work, app)


@pytest.mark.parametrize("body", [b"short", b"longer than it says"])
def test_answer_of_another_length_than_declared_ends_the_connection(body: bytes) -> None:
    """What follows could be taken for the next answer."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"8")]})
        await send({"type": "http.response.body", "body": body})

    async def work(wire: Wire) -> None:
        got = await wire.ask(GET + GET)
        assert statuses(got) == [200]
        assert body not in got

    run(work, app)


def test_answer_with_a_line_break_in_a_header_is_not_sent() -> None:
    """It could forge headers."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, b"x", 200, (b"x-request-id", b"a\r\nset-cookie: b"))

    async def work(wire: Wire) -> None:
        got = await wire.ask(GET)
        assert statuses(got) == [500]
        assert b"set-cookie" not in got

    run(work, app)


# IPv6, and the end


@asynccontextmanager
async def started(
    app: Answering,
    host: str = "127.0.0.1",
    limits: Limits | None = None,
    on_late_request: Callable[[], None] = lambda: None,
) -> AsyncIterator[tuple[HttpServer, int]]:
    """Start a server that the test stops; yield it and its port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        server = HttpServer(with_lifespan(app), limits, on_late_request)
        await server.start([listener])
        yield server, listener.getsockname()[1]


def test_client_of_ipv6_is_served_and_known() -> None:
    """Its address has two parts in the scope, as that of IPv4."""
    seen: list[Any] = []

    async def note(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["client"][0], len(scope["client"]), scope["server"][0], len(scope["server"])))
        await echo(scope, receive, send)

    async def main() -> None:
        async with started(note, "::1") as (server, port):
            reader, writer = await asyncio.open_connection("::1", port)
            writer.write(GET)
            assert b" 200 " in await reader.readline()
            writer.close()
            await server.stop(1)

    asyncio.run(main())
    assert seen == [("::1", 2, "::1", 2)]


def test_stop_closes_idle_connections_and_lets_a_request_end() -> None:
    """The answer in progress is whole and the last of its connection; new connections are refused."""
    go_on = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await go_on.wait()
        await echo(scope, receive, send)

    async def main() -> None:
        async with started(slow) as (server, port):
            wire = Wire(port)
            async with wire.connection() as (busy, writer), wire.connection() as (idle, _):
                writer.write(GET)
                await asyncio.sleep(0.1)
                stopping = asyncio.ensure_future(server.stop(5))
                assert await idle.read() == b""
                with pytest.raises(OSError):
                    await asyncio.open_connection("127.0.0.1", port)
                assert not stopping.done()
                go_on.set()
                got = await busy.read()
                assert statuses(got) == [200]
                assert b"connection: close" in got
                async with asyncio.timeout(1):
                    await stopping

    asyncio.run(main())


def test_stop_answers_a_request_that_has_arrived() -> None:
    """It is the last of its connection, as those in progress are."""

    async def main() -> None:
        async with started(echo) as (server, port), Wire(port).connection() as (reader, writer):
            await eventually(lambda: bool(server._shared.waiting))
            writer.write(GET)  # reaches the kernel at once
            await server.stop(5)
            got = await reader.read()
            assert statuses(got) == [200]
            assert b"connection: close" in got

    asyncio.run(main())


@pytest.mark.parametrize("abort", [False, True])
def test_stop_cancels_requests_that_outlast_the_grace_or_are_aborted(abort: bool) -> None:
    """The client sees the connection end; the application is told before its lifespan ends."""
    told: list[str] = []

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            told.append("cancelled")
            raise

    async def main() -> None:
        async with started(endless) as (server, port), Wire(port).connection() as (reader, writer):
            writer.write(GET)
            await asyncio.sleep(0.1)
            async with asyncio.timeout(3):
                stopping = asyncio.ensure_future(server.stop(60 if abort else 0.2))
                if abort:
                    await asyncio.sleep(0.1)
                    server.abort()
                await stopping
                assert await reader.read() == b""

    asyncio.run(main())
    assert told == ["cancelled"]


@pytest.mark.parametrize("fails_by", ["message", "exception", "return"])
def test_application_that_does_not_start_is_an_error(fails_by: str) -> None:
    """Nothing listens then."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        if fails_by == "message":
            await send({"type": "lifespan.startup.failed", "message": "no engine"})
        elif fails_by == "exception":
            raise RuntimeError("no engine")

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            await HttpServer(app).start([listener])

    with pytest.raises(RuntimeError, match="no engine" if fails_by != "return" else "lifespan ended"):
        asyncio.run(main())


@pytest.mark.parametrize(
    ("sent", "status"),
    [(GET, 200), (GET[:-2] + b"a: " + b"a" * 200_000, 431), (GET[:-2], 408), (b"no HTTP\r\n\r\n", 400)],
    ids=["answered", "large head", "slow head", "invalid"],
)
def test_connection_that_has_ended_leaves_no_garbage_that_needs_collecting(sent: bytes, status: int) -> None:
    """The gateway collects rarely: of clients that connect anew for each request it would keep hundreds."""

    def left() -> int:
        return sum(isinstance(one, Connection | RequestParser) for one in gc.get_objects())

    async def work(wire: Wire) -> None:
        for _ in range(5):
            async with wire.connection() as (reader, writer):
                writer.write(sent)
                assert statuses(await reader.readuntil(b"}")) == [status]
        await eventually(lambda: left() <= before)

    gc.collect()
    before = left()  # what an earlier test still holds
    gc.disable()
    try:
        run(work, limits=QUICK)
    finally:
        gc.enable()


def test_application_that_asks_late_whether_the_client_has_left_is_told_at_once() -> None:
    """It would work on for nobody: the end of the connection is told once."""
    told = asyncio.Event()

    async def late(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope["extensions"][ON_LEAVE](told.set)

    async def work(wire: Wire) -> None:
        async with wire.connection() as (_, writer):
            writer.write(GET)
            await asyncio.sleep(0.05)
        async with asyncio.timeout(5):
            await told.wait()

    run(work, late)
