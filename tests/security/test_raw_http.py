"""Bytes that are no proper HTTP, with a right key: a documented status or a closed connection, no second request."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from tests.gateway.wire import MIB, statuses

from .raw_requests import CHUNKED, CLOSES, HIDDEN, MARK, SERVED_BY_UVICORN, RawCase, cases
from .targets import Target

AT_A_TIME = 32
ANSWER_S, SILENCE_S = 60.0, 1.0


async def send(port: int, sent: bytes, answer_s: float = ANSWER_S) -> bytes:
    """Send bytes, and return everything that comes until the server closes or is silent."""
    got = b""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError, TimeoutError):
        writer.write(sent)
        while more := await asyncio.wait_for(reader.read(65536), SILENCE_S if got else answer_s):
            got += more
    writer.transport.abort()
    return got


async def send_all(port: int, wanted: dict[str, RawCase]) -> dict[str, bytes]:
    """Send the bytes of each case on a connection of its own, and return what comes back."""
    free = asyncio.Semaphore(AT_A_TIME)

    async def one(case: RawCase) -> bytes:
        async with free:
            return await send(port, case.sent, SILENCE_S if CLOSES in case.statuses else ANSWER_S)

    return dict(zip(wanted, await asyncio.gather(*map(one, wanted.values())), strict=True))


def fault(case: RawCase, got: bytes) -> str | None:
    """Return what is wrong with what came back; None: nothing."""
    found = [status for status in statuses(got) if status != 100] or [CLOSES]
    if found[0] not in case.statuses or len(found) > case.answers:
        return f"answered {found}"
    return "found the hidden request" if MARK in got and case.sent.endswith(HIDDEN) else None


def test_raw_requests_are_refused_or_served_as_one(attacked: Target) -> None:
    """A documented status or a closed connection, no traceback, and never the request that hides in another."""
    wanted = cases()
    assert len(wanted) > 250
    with attacked.unharmed():
        got = asyncio.run(send_all(attacked.port, wanted))
        faults = {name: found for name, case in wanted.items() if (found := fault(case, got[name]))}
        if attacked.name == "guard":
            faults = {name: found for name, found in faults.items() if name not in SERVED_BY_UVICORN}
            assert all(max(statuses(got[name])) < 500 for name in SERVED_BY_UVICORN)
        assert faults == {}


def test_hidden_request_is_found_where_it_is_not_hidden(attacked: Target) -> None:
    """The request that the cases hide is one that the service answers by its name."""
    assert MARK in asyncio.run(send(attacked.port, HIDDEN))


@pytest.mark.parametrize(
    "begin",
    [b"GET / HTTP/1.1\r\na: ", CHUNKED + b"1;", CHUNKED + b"1\r\n{\r\n0\r\na: "],
    ids=["head", "extension of a chunk", "trailer"],
)
def test_bytes_without_end_that_are_no_body_are_refused(attacked: Target, begin: bytes) -> None:
    """A head of 100 MB cost an engine 49 s and 2 GB, and a trailer the gateway 35 s."""
    before = attacked.memory()
    with attacked.unharmed(), socket.create_connection(("127.0.0.1", attacked.port), timeout=10) as connection:
        connection.sendall(begin)
        answered = b""
        with contextlib.suppress(ConnectionError):  # it answers and closes while there is more to send
            for _ in range(16):
                connection.sendall(b"a" * 65536)
            answered = connection.recv(4096)
    assert statuses(answered) in ([], [431])
    assert attacked.memory() - before < 16 * MIB
