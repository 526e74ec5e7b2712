"""Turns among clients: who comes next, what is charged, and what those leave behind that do not wait."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

import pytest
from vllm_service.client_turns import Turns


class Office:
    """Takes turns whose time is scripted; `order` has the clients as they came to theirs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.turns = Turns(lambda: self.now)
        self.order: list[str] = []

    async def work(self, name: str, seconds: float) -> None:
        """Have one turn of a client."""
        async with self.turns.take(name):
            self.order.append(name)
            await asyncio.sleep(0)
            self.now += seconds

    async def all(self, *works: Coroutine[Any, Any, None]) -> str:
        """Do work, all of it asked for at the same time, and return the order."""
        await asyncio.gather(*works)
        return " ".join(self.order)


def test_turns_of_one_client_come_in_the_order_of_its_requests() -> None:
    """One at a time."""

    async def run() -> None:
        numbers: list[int] = []
        turns = Turns()

        async def work(number: int) -> None:
            async with turns.take("one"):
                numbers.append(number)
                await asyncio.sleep(0)
                numbers.append(number)

        await asyncio.gather(*(work(number) for number in range(3)))
        assert numbers == [0, 0, 1, 1, 2, 2]

    asyncio.run(run())


def test_turns_are_given_by_the_time_that_clients_have_taken() -> None:
    """Many of one second for one of ten."""

    async def run() -> None:
        office = Office()
        slow = (office.work("slow", 10) for _ in range(3))
        quick = (office.work("quick", 1) for _ in range(12))
        assert await office.all(*slow, *quick) == " ".join(["slow", *["quick"] * 10, "slow", *["quick"] * 2, "slow"])

    asyncio.run(run())


def test_client_that_comes_later_is_next_and_has_saved_up_nothing() -> None:
    """What others took before it came is nothing that it may take now."""

    async def run() -> None:
        office = Office()
        await office.all(*(office.work("old", 10) for _ in range(5)))
        office.order.clear()
        old = [asyncio.create_task(office.work("old", 10)) for _ in range(3)]
        await asyncio.sleep(0)
        new = [asyncio.create_task(office.work("new", 10)) for _ in range(3)]
        await asyncio.gather(*old, *new)
        assert office.order == ["old", "new", "old", "new", "old", "new"]

    asyncio.run(run())


def test_next_step_of_a_client_comes_before_those_that_have_taken_more() -> None:
    """It begins to wait only when its step before has ended."""

    async def run() -> None:
        office = Office()

        async def steps() -> None:
            for _ in range(3):
                await office.work("steps", 0.1)

        waiting = [asyncio.create_task(office.work("slow", 2)) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.gather(steps(), *waiting)
        assert office.order == ["slow", "steps", "steps", "steps", "slow", "slow"]

    asyncio.run(run())


@pytest.mark.parametrize("number", [0, 1, 2])
def test_client_that_leaves_holds_up_nobody(number: int) -> None:
    """Whether it has its turn, has just been given it, or waits; and nothing is kept of it."""

    async def run() -> None:
        turns = Turns()
        done: list[int] = []

        async def work(name: int) -> None:
            async with turns.take(str(name)):
                await asyncio.sleep(0)
                done.append(name)

        for after in range(8):  # rounds of the event loop
            done.clear()
            tasks = [asyncio.create_task(work(name)) for name in range(3)]
            for _ in range(after):
                await asyncio.sleep(0)
            tasks[number].cancel()
            async with asyncio.timeout(5):
                for task in tasks:
                    with contextlib.suppress(asyncio.CancelledError):
                        await task
            assert set(done) >= {0, 1, 2} - {number}
            assert not turns._waiting
            assert not turns._is_taken
            assert turns.waiting(str(number)) == 0

    asyncio.run(run())


def test_turns_forget_clients_that_have_left() -> None:
    """A client may have as many names as it likes."""

    async def run() -> None:
        office = Office()
        for number in range(1000):
            await office.work(f"client {number}", 0.01)
            await asyncio.sleep(0)
        assert len(office.turns._shares) < 10

    asyncio.run(run())
