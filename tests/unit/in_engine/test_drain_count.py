"""Which requests a drain counts and waits for, and which it leaves alone."""

from __future__ import annotations

import asyncio

import pytest
from vllm_service import drain
from vllm_service.answer import Answer
from vllm_service.api_error import Message
from vllm_service.drain import Drain
from vllm_service.guard import Guard

from tests.unit.in_engine.test_drain import CANCEL_S, CHAT, LONG_S, SSE, Client, run
from tests.unit.in_engine.test_guard import Behind


@pytest.mark.parametrize("begun", [False, True])
def test_drain_does_not_swallow_other_cancellations(begun: bool) -> None:
    """When a client leaves or the server ends, the cancellation propagates, and nothing is sent."""

    async def scene() -> None:
        ended = Drain()
        client = Client(ended)
        task = await client.begin(SSE, b"one")
        over = asyncio.ensure_future(ended.drain(LONG_S, CANCEL_S)) if begun else None
        await asyncio.sleep(0)
        task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await task
        assert client.body == b"one"
        assert await (over or ended.drain(LONG_S, CANCEL_S)) == 0  # it is in flight no more

    run(scene)


def test_drain_counts_only_the_requests_that_it_cancels() -> None:
    """Of three requests one finishes within the grace period, and of one the client leaves."""

    async def scene() -> None:
        ended = Drain()
        done, left, cut = Client(ended), Client(ended), Client(ended)
        tasks = [await client.begin(SSE, b"one ") for client in (done, left, cut)]
        tasks[1].cancel()
        done.go_on.set()

        assert await ended.drain(0.05, CANCEL_S) == 1
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [type(None), asyncio.CancelledError, type(None)]
        assert [client.body[-8:] for client in (done, cut)] == [b"one end", b"[DONE]\n\n"]

    run(scene)


def test_drain_commanded_twice_ends_each_request_once() -> None:
    """Two simultaneous stops send two commands."""

    async def scene() -> None:
        ended = Drain()
        client = Client(ended)
        task = await client.begin(SSE)

        counts = await asyncio.gather(ended.drain(0.02, CANCEL_S), ended.drain(0.02, CANCEL_S))
        await task
        assert counts[0] == 1
        assert client.body.count(b"[DONE]") == 1

    run(scene)


def test_drain_does_not_wait_for_an_application_that_does_not_end() -> None:
    """A request that ignores its cancellation ends with the kill that follows."""

    async def scene() -> None:
        ended = Drain()
        stubborn, leave = asyncio.Event(), asyncio.Event()

        async def app() -> None:
            stubborn.set()
            while not leave.is_set():
                try:
                    await leave.wait()
                except asyncio.CancelledError:
                    continue

        task = asyncio.ensure_future(ended.run(Answer({"path": CHAT, "headers": []}, _nowhere), app))
        await stubborn.wait()

        assert await ended.drain(0, 0.02) == 1
        assert not task.done()
        leave.set()
        await task

    run(scene)


def test_drain_of_the_process_is_one() -> None:
    """The guard asks the drain that the startup plugin begins."""
    assert drain.current() is drain.current()
    assert Guard(Behind(), [])._drain is drain.current()


async def _nowhere(_: Message) -> None:
    """Send to a client that is not there."""
