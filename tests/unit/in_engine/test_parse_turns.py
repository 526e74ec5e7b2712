"""Turns of bodies that take the event loop long."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest
from vllm_service import parse_turns
from vllm_service.client_turns import client
from vllm_service.parse_turns import ParseTurns

BUSY_S = 0.05


def burn(seconds: float) -> None:
    """Take the event loop, as a parser does."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


async def parse(turns: ParseTurns, name: str, order: list[tuple[str, float]], *, generates_s: float = 0) -> None:
    """Take a turn as a client, and note when it began."""
    client.set(name)
    async with turns.take():
        order.append((name, time.monotonic()))
        burn(BUSY_S)
        if generates_s:
            parse_turns.end()
            await asyncio.sleep(generates_s)


def test_long_bodies_rest_between_each_other_and_clients_take_turns() -> None:
    """The second of one client comes after the first of another, and each after a rest of twice the time."""

    async def main() -> list[tuple[str, float]]:
        turns, order = ParseTurns(), list[tuple[str, float]]()
        await asyncio.gather(*(parse(turns, name, order) for name in ("a", "a", "b")))
        return order

    order = asyncio.run(main())
    assert [name for name, _ in order] == ["a", "b", "a"]
    assert all(later - earlier >= 3 * BUSY_S for (_, earlier), (_, later) in itertools.pairwise(order))


def test_turn_ends_when_the_engine_begins() -> None:
    """A long generation delays no other request's body."""

    async def main() -> list[tuple[str, float]]:
        turns, order = ParseTurns(), list[tuple[str, float]]()
        first = asyncio.create_task(parse(turns, "a", order, generates_s=60))
        await asyncio.wait_for(parse(turns, "b", order), 30)
        first.cancel()
        return order

    assert [name for name, _ in asyncio.run(main())] == ["a", "b"]


def test_turn_ends_by_itself_where_the_request_waits_for_something_else() -> None:
    """Such as for an image; the next one is parsed meanwhile."""

    async def main() -> list[tuple[str, float]]:
        turns, order = ParseTurns(most_s=0.2), list[tuple[str, float]]()

        async def wait_for_an_image() -> None:
            async with turns.take():
                await asyncio.sleep(60)

        first = asyncio.create_task(wait_for_an_image())
        await asyncio.sleep(0)
        await asyncio.wait_for(parse(turns, "b", order), 30)
        first.cancel()
        return order

    assert [name for name, _ in asyncio.run(main())] == ["b"]


def test_end_without_a_turn_does_nothing() -> None:
    """Most requests have none."""
    parse_turns.end()


@pytest.mark.parametrize(
    ("path", "body", "is_long"),
    [
        ("/v1/chat/completions", b"a" * 10_000_000, False),
        ("/v1/chat/completions", b"[" + b"1," * 25_000, True),
        ("/tokenize", b"a" * 70_000, True),
        ("/tokenize", b"a" * 60_000, False),
        ("/v1/completions", b'{"prompt": [' + b'"a",' * 256 + b'"a"]}', True),
        ("/v1/completions", b'{"prompt": [' + b"[1]," * 256 + b"[1]]}", True),
        ("/v1/embeddings", b'{"input": [' + b'"a",' * 256 + b'"a"]}', True),
        ("/v1/completions", b'{"prompt": [' + b'"a",' * 255 + b'"a"]}', False),
        ("/v1/completions", b'{"prompt": [' + b"1," * 999 + b"1]}", False),
        ("/v1/completions", b'{"prompt": "' + b'\\"' * 999 + b'"}', False),
        ("/v1/completions", b'{"\xff": "' + b"[" * 999 + b'"}', False),
    ],
)
def test_body_is_long_by_its_values_texts_or_tokens(path: str, body: bytes, is_long: bool) -> None:
    """A large image is read at once, and each value and token by itself."""
    assert parse_turns.is_long(path, body) == is_long
