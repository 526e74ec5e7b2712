"""How many sequences of one client the engine core has at a time, so that another client's request finds a place.

vLLM serves its queue in the order of arrival: a prompt of 1,000 texts held up the one-token request of another client
for 12 s. Here the sequences of one client beyond its share wait in the API server, behind nobody but each other.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from vllm_service import parse_turns
from vllm_service.client_turns import client

_RESERVED = 8  # one in so many places is never taken by the client that has the others


def enable(engine: Any) -> None:
    """Hold every client of this engine to its share; requests of the engine's own, such as probes, have none.

    Args:
        engine: vLLM's `AsyncLLM`.
    """
    places = engine.vllm_config.scheduler_config.max_num_seqs
    shares = ClientShares(max(1, places - max(1, places // _RESERVED)))
    for name in ("generate", "encode"):
        setattr(engine, name, _sharing(getattr(engine, name), shares))


def _sharing(run: Any, shares: ClientShares) -> Any:
    async def shared(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        params = args[1] if len(args) > 1 else kwargs.get("sampling_params")
        parse_turns.end()
        places = getattr(params, "n", 1)  # parameters of pooling have none
        async with shares.hold(client.get(), places), aclosing(run(*args, **kwargs)) as outputs:
            async for output in outputs:
                yield output

    return shared


class ClientShares:
    """Places of clients. Belongs to one event loop.

    Args:
        most: Places of one client.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[tuple[int, asyncio.Future[None]]]] = {}

    @asynccontextmanager
    async def hold(self, name: str, places: int) -> AsyncIterator[None]:
        """Wait for places of a client, and have them until the end of the block.

        Args:
            name: The client's; empty: the engine's own requests, which have no bound.
            places: How many; more than a client may have count as all of them.
        """
        places = min(places, self.most) if name else 0
        if places:
            await self._take(name, places)
        try:
            yield
        finally:
            if places:
                self._give(name, places)

    async def _take(self, name: str, places: int) -> None:
        if name not in self._waiting and self._held[name] + places <= self.most:
            self._held[name] += places
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(name, deque()).append((places, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._give(name, 0)  # those behind may fit
            else:
                self._give(name, places)
            raise

    def _give(self, name: str, places: int) -> None:
        self._held[name] -= places
        queue = self._waiting.get(name, deque())
        while queue and (queue[0][1].done() or self._held[name] + queue[0][0] <= self.most):
            wanted, turn = queue.popleft()
            if not turn.done():
                self._held[name] += wanted
                turn.set_result(None)
        if not queue:
            self._waiting.pop(name, None)
        if not self._held[name]:
            del self._held[name]
