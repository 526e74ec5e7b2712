"""Names and addresses of engines, and what becomes of a connection that cannot be opened."""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from service.gateway.http_client import addresses as addresses_module
from service.gateway.http_client import connections as connections_module
from service.gateway.http_client.answer import ConnectError
from service.gateway.http_client.connection import Connection
from service.gateway.http_client.connections import Connections, Origin
from service.gateway.upstream import Attempt, is_own_shortage
from tests.gateway.scripted_server import GET, OK, listening
from tests.gateway.upstream import eventually, no_descriptors
from tests.unit.tls import self_signed


async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer each request."""
    while True:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b"Content-Length: 2\r\n\r\nhi")


class Resolver:
    """Answers look-ups of the loop that runs: after a while, with these addresses, or with an error."""

    def __init__(self, *addresses: str, takes_s: float = 0.0) -> None:
        self.addresses, self.takes_s, self.asked = addresses, takes_s, list[str]()
        asyncio.get_running_loop().getaddrinfo = self._getaddrinfo  # type: ignore[method-assign]

    async def _getaddrinfo(self, host: str, port: object, **_: object) -> list[Any]:
        self.asked.append(host)
        assert port is None
        await asyncio.sleep(self.takes_s)
        if not self.addresses:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in self.addresses]


class Opened:
    """Opens connections in the loop's place: each address does what it is told, or connects."""

    def __init__(self, **told: float | OSError) -> None:
        self.loop = asyncio.get_running_loop()
        self.told = {address.replace("_", ".").lstrip("a"): what for address, what in told.items()}
        self.tried = list[str]()
        self._connect = self.loop.create_connection
        self.loop.create_connection = self._create_connection  # type: ignore[method-assign]

    async def _create_connection(self, made: Any, address: str, port: int, **settings: Any) -> Any:
        self.tried.append(address)
        what = self.told.get(address)
        if isinstance(what, OSError):
            raise what
        await asyncio.sleep(what or 0.0)
        return await self._connect(made, "127.0.0.1", port, **settings)


@asynccontextmanager
async def named(name: str = "engine.test") -> AsyncIterator[tuple[Origin, Connections]]:
    """Serve under a name."""
    async with listening(answers) as origin, Connections(60) as connections, asyncio.timeout(10):
        yield Origin.of(f"http://{name}:{origin.port}"), connections


async def ask(connections: Connections, origin: Origin) -> None:
    """Ask once and read the answer."""
    assert await (await connections.request(origin, GET)).read_all(9) == b"hi"


def test_client_looks_a_name_up_once_for_all_who_wait_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new connection had a look-up of its own: with a slow resolver, most of 200 at once had no connection."""

    async def run() -> None:
        resolver = Resolver("127.0.0.1", takes_s=0.3)
        async with named() as (origin, connections):
            await asyncio.gather(*(ask(connections, origin) for _ in range(200)))
            assert (resolver.asked, connections.idle) == (["engine.test"], 200)
            await asyncio.gather(*(ask(connections, origin) for _ in range(201)))
            assert resolver.asked == ["engine.test"]
            monkeypatch.setattr(addresses_module, "_KEPT_S", 0)
            await asyncio.gather(*(ask(connections, origin) for _ in range(202)))
            assert resolver.asked == ["engine.test"] * 2

    asyncio.run(run())


def test_client_does_not_count_the_look_up_towards_the_time_for_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it has a bound of its own, after which the next request waits for the same look-up."""
    monkeypatch.setattr(connections_module, "CONNECT_S", 0.2)

    async def run() -> None:
        resolver = Resolver("127.0.0.1", takes_s=0.4)
        async with named() as (origin, connections):
            monkeypatch.setattr(addresses_module, "_LOOKUP_S", 0.1)
            with pytest.raises(ConnectError, match=r"No address of engine\.test .* in time"):
                await ask(connections, origin)
            monkeypatch.setattr(addresses_module, "_LOOKUP_S", 1)
            await ask(connections, origin)
            assert resolver.asked == ["engine.test"]

    asyncio.run(run())


def test_client_that_is_cancelled_during_a_look_up_cancels_it_for_nobody_else() -> None:
    """And a failure that nobody waits for is none to report."""

    async def run() -> None:
        reported = list[object]()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        resolver = Resolver("127.0.0.1", takes_s=0.1)
        async with named() as (origin, connections):
            first, second = [asyncio.ensure_future(ask(connections, origin)) for _ in range(2)]
            await asyncio.sleep(0.01)
            first.cancel()
            await second
            assert (first.cancelled(), len(resolver.asked)) == (True, 1)
            resolver.addresses = ()
            connections._addresses.forget("engine.test")
            connections.kept_s = 0
            third = asyncio.ensure_future(ask(connections, origin))
            await asyncio.sleep(0.01)
            third.cancel()
            await eventually(lambda: not connections._addresses._lookups)
            await asyncio.sleep(0.01)
            assert (third.cancelled(), len(resolver.asked)) == (True, 2)
            del third
            gc.collect()
            assert reported == []

    asyncio.run(run())


def test_client_looks_no_address_up() -> None:
    """It is one already."""

    async def run() -> None:
        resolver = Resolver()
        async with named("127.0.0.1") as (origin, connections):
            await ask(connections, origin)
            assert resolver.asked == []

    asyncio.run(run())


def test_client_looks_a_name_up_again_after_a_failure() -> None:
    """Of the look-up itself, and of a connection: the engine may have moved."""

    async def run() -> None:
        resolver = Resolver()
        async with named() as (origin, connections):
            with pytest.raises(ConnectError, match=r"^No address of engine\.test: .*Temporary failure"):
                await ask(connections, origin)
            resolver.addresses = ("127.0.0.1",)
            with pytest.raises(ConnectError, match=r"^No connection to engine\.test:1: \[Errno"):
                await ask(connections, Origin.of("http://engine.test:1"))
            await ask(connections, origin)
            assert len(resolver.asked) == 3

    asyncio.run(run())


def test_client_tries_the_next_address_soon_and_begins_at_the_good_one_later() -> None:
    """One dead address of several made each new connection fail, after 10 s."""

    async def run() -> None:
        Resolver("10.0.0.1", "10.0.0.2", "10.0.0.3")
        opened = Opened(a10_0_0_1=60.0, a10_0_0_2=OSError(errno.ECONNREFUSED, "refused"))
        async with named() as (origin, connections):
            began = time.monotonic()
            await ask(connections, origin)
            assert 0.2 < time.monotonic() - began < 2
            assert opened.tried == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
            await asyncio.gather(*(ask(connections, origin) for _ in range(3)))
            assert opened.tried[3:] == ["10.0.0.3"] * 2
            await eventually(lambda: len(asyncio.all_tasks()) == 4)  # this one, and those of the server's connections

    asyncio.run(run())


def test_client_closes_the_connection_to_an_address_that_comes_second() -> None:
    """Where two are open at once, one serves; and whoever is cancelled leaves none."""

    async def run() -> None:
        made = [Connection(asyncio.get_running_loop(), lambda _: None, lambda _: None) for _ in range(2)]
        closed = list[int]()

        class Transport:
            def __init__(self, number: int) -> None:
                self.number = number

            def abort(self) -> None:
                closed.append(self.number)

        for number, one in enumerate(made):
            one.transport = Transport(number)  # type: ignore[assignment]
        gate = asyncio.Event()

        async def open_at(address: str) -> Connection:
            if address == "0":
                await gate.wait()
            else:
                gate.set()
                await asyncio.sleep(0)
            return made[int(address)]

        _, chosen = await addresses_module.first_open(["0", "1"], open_at)
        await asyncio.sleep(0.01)
        assert closed == [1 - made.index(chosen)]

    asyncio.run(run())


def test_client_that_is_not_connected_in_time_says_that_nobody_saw_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a request is sent again, also where Modal's proxy would have been next."""
    monkeypatch.setattr(connections_module, "CONNECT_S", 0.1)

    async def run() -> None:
        Opened(a127_0_0_1=60.0)
        async with named("127.0.0.1") as (origin, connections):
            with pytest.raises(ConnectError, match=r"within 0\.1 s\.$") as told:
                await ask(connections, origin)
            attempt = Attempt()
            attempt.passes_modal = True
            assert attempt.is_safe_to_retry(told.value)
            assert told.value.errno == errno.ETIMEDOUT

    asyncio.run(run())


@pytest.mark.parametrize(
    ("first", "second", "found", "is_ours"),
    [
        (errno.ECONNREFUSED, errno.EMFILE, errno.EMFILE, True),
        (errno.EADDRNOTAVAIL, errno.ECONNREFUSED, errno.ECONNREFUSED, False),
        (errno.EADDRNOTAVAIL, errno.EADDRNOTAVAIL, errno.EADDRNOTAVAIL, True),
        (errno.ECONNREFUSED, errno.ENETUNREACH, errno.ECONNREFUSED, False),
    ],
)
def test_client_tells_why_no_address_took_a_connection(first: int, second: int, found: int, is_ours: bool) -> None:
    """Each reason once; and its own shortage, where that is one of them."""

    async def run() -> None:
        Resolver("10.0.0.1", "10.0.0.2")
        Opened(a10_0_0_1=OSError(first, "one"), a10_0_0_2=OSError(second, "one" if first == second else "two"))
        async with named() as (origin, connections):
            with pytest.raises(ConnectError) as told:
                await ask(connections, origin)
            reasons = f"[Errno {first}] one" + (f"; [Errno {second}] two" if first != second else "")
            assert str(told.value) == f"No connection to {origin.authority}: {reasons}"
            assert (told.value.errno, is_own_shortage(told.value)) == (found, is_ours)

    asyncio.run(run())


def test_client_without_descriptors_closes_the_connections_that_were_idle_longest() -> None:
    """They are of other pools, whose engines are asked again later; those used last stay."""

    async def run() -> None:
        async with listening(answers) as other, named("127.0.0.1") as (origin, connections):
            await asyncio.gather(*(ask(connections, other) for _ in range(6)))
            opened = Opened()
            opened.told["127.0.0.1"] = OSError(errno.EMFILE, "Too many open files")
            with pytest.raises(ConnectError) as told:
                await ask(connections, origin)
            assert (is_own_shortage(told.value), len(opened.tried)) == (True, 2)
            kept = connections._idle[other]
            assert [one.transport.is_closing() for one in kept] == [True] * 4 + [False] * 2

    asyncio.run(run())


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_client_without_descriptors_gets_one_from_an_idle_connection(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """At once: closed means closed."""

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as unaccepted:
            origin = Origin.of(f"http://127.0.0.1:{unaccepted.getsockname()[1]}")
            async with listening(answers) as other, Connections(60) as connections, asyncio.timeout(10):
                await asyncio.gather(*(ask(connections, other) for _ in range(2)))
                with no_descriptors():
                    connection = await connections._connect(origin)
                assert not connection.transport.is_closing()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())


def test_client_checks_the_name_in_a_certificate_and_not_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is opened to an address, and the engine is still who the URL says, or none."""
    made = self_signed(tmp_path)
    trusting = ssl.create_default_context(cafile=str(made.file))
    monkeypatch.setattr(connections_module, "_tls_context", lambda: trusting)

    async def run() -> None:
        async with listening(answers, made.server_context()) as origin, Connections(60) as connections:
            Resolver("127.0.0.1")
            await ask(connections, origin)
            with pytest.raises(ConnectError, match=r"not valid for 'engine\.test'"):
                await ask(connections, Origin.of(f"https://engine.test:{origin.port}"))

    asyncio.run(run())


def test_client_whose_new_connection_has_ended_already_sends_nothing_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end was told before there was an answer, which would never end."""
    first_open = connections_module.first_open

    async def ended(addresses: Any, open_at: Any) -> Any:
        address, connection = await first_open(addresses, open_at)
        connection.transport.abort()
        await asyncio.sleep(0.01)
        return address, connection

    monkeypatch.setattr(connections_module, "first_open", ended)

    async def run() -> None:
        async with named("127.0.0.1") as (origin, connections):
            with pytest.raises(ConnectError, match="closed a connection as soon as it was open"):
                await ask(connections, origin)
            assert not connections._open

    asyncio.run(run())
