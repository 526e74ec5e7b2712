"""Shares of clients in the engine core: who waits, for whom, and what those that leave give back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_service import client_shares
from vllm_service.client_shares import ClientShares
from vllm_service.client_turns import client


class Held:
    """Requests that hold places until they are told to end."""

    def __init__(self, most: int) -> None:
        self.shares, self.running = ClientShares(most), set[str]()
        self._ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def begin(self, label: str, name: str, places: int = 1) -> None:
        """Begin a request."""
        self._ends[label] = asyncio.Event()
        self.tasks[label] = asyncio.create_task(self._hold(label, name, places))
        await self.settle()

    async def end(self, label: str) -> None:
        """End a request that holds its places."""
        self._ends[label].set()
        await self.settle()

    async def leave(self, label: str) -> None:
        """Cancel a request."""
        self.tasks[label].cancel()
        await self.settle()

    async def settle(self) -> None:
        """Let all tasks go as far as they can."""
        for _ in range(10):
            await asyncio.sleep(0)

    async def _hold(self, label: str, name: str, places: int) -> None:
        async with self.shares.hold(name, places):
            self.running.add(label)
            try:
                await self._ends[label].wait()
            finally:
                self.running.discard(label)


def run(most: int, scenario: Callable[[Held], Any]) -> None:
    """Run a scenario in an event loop."""

    async def main() -> None:
        held = Held(most)
        await scenario(held)
        assert not held.shares._waiting
        for task in held.tasks.values():
            task.cancel()
        await asyncio.gather(*held.tasks.values(), return_exceptions=True)
        assert not held.shares._held

    asyncio.run(main())


def test_client_beyond_its_share_waits_for_its_own_and_others_do_not() -> None:
    """The third of one client waits until the first has ended; another client's runs at once."""

    async def scenario(held: Held) -> None:
        for label in ("a1", "a2", "a3"):
            await held.begin(label, "a")
        await held.begin("b1", "b")
        assert held.running == {"a1", "a2", "b1"}
        await held.end("a1")
        assert held.running == {"a2", "a3", "b1"}

    run(2, scenario)


def test_request_of_many_places_is_not_overtaken_and_gets_at_most_a_share() -> None:
    """A smaller one behind it waits too; one of more places than a client may have gets all of them."""

    async def scenario(held: Held) -> None:
        await held.begin("a1", "a")
        await held.begin("a2", "a", places=9)
        await held.begin("a3", "a")
        assert held.running == {"a1"}
        await held.end("a1")
        assert held.running == {"a2"}
        await held.end("a2")
        assert held.running == {"a3"}

    run(3, scenario)


def test_request_that_leaves_gives_its_places_back() -> None:
    """Whether it holds them, waits for them, or has been given them in the same turn of the loop."""

    async def scenario(held: Held) -> None:
        await held.begin("a1", "a")
        await held.begin("a2", "a", places=2)
        await held.begin("a3", "a")
        await held.leave("a2")
        assert held.running == {"a1", "a3"}
        await held.begin("a4", "a")
        held.tasks["a1"].cancel()
        await asyncio.sleep(0)
        await held.leave("a4")
        await held.begin("a5", "a")
        assert held.running == {"a3", "a5"}

    run(2, scenario)


def test_requests_of_nobody_have_no_bound() -> None:
    """The engine's own probes are never held up."""

    async def scenario(held: Held) -> None:
        for number in range(5):
            await held.begin(str(number), "")
        assert len(held.running) == 5

    run(1, scenario)


@pytest.mark.parametrize(("places", "most"), [(1, 1), (2, 1), (18, 16), (256, 224)])
def test_engine_whose_output_is_left_ends_it_and_gives_the_places_back(places: int, most: int) -> None:
    """The engine's generator is closed with ours, so that the engine aborts the request at once."""
    ended: list[str] = []

    async def generate(prompt: str, sampling_params: Any, request_id: str) -> AsyncIterator[str]:
        assert sampling_params is None or sampling_params.n == most
        try:
            for token in (prompt, request_id, "more"):
                yield token
        finally:
            ended.append(request_id)

    async def main() -> None:
        config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=places))
        engine = SimpleNamespace(vllm_config=config, generate=generate, encode=generate)
        client_shares.enable(engine)
        client.set("alice")
        for _ in range(2):
            outputs = engine.generate("hi", sampling_params=SimpleNamespace(n=most), request_id="1")
            assert await anext(outputs) == "hi"
            await outputs.aclose()
        assert [output async for output in engine.encode("hi", None, "2")] == ["hi", "2", "more"]

    asyncio.run(main())
    assert ended == ["1", "1", "2"]
