"""Faults of Modal's proxy, drawn from a seed: limits, redirects without end, 502, connections that break off.

A fault comes before a request is passed on, except `LATE_RESET`: then a container has the request.
"""

from __future__ import annotations

import asyncio
import enum
import random

from aiohttp import web

CALL_QUERY = "__modal_function_call_id"
_LOOP = "loop-"  # begins the id of a call that is nowhere
_LATE_S = 0.3
_LONGEST_LOOP = 12


class Fault(enum.Enum):
    """What happens to a request."""

    RATE_LIMIT = 429
    EXPIRED = 408
    LOOP = 303
    BAD_GATEWAY = 502
    RESET = 0
    LATE_RESET = 1


class Faults:
    """Draws faults.

    Args:
        seed: The same seed gives the same faults.
        share: Of the requests that get one.
    """

    def __init__(self, seed: int, share: float) -> None:
        self._random, self._share = random.Random(seed), share  # noqa: S311 - no secret
        self.drawn: list[Fault] = []
        self._next: list[Fault] = []

    def draw(self) -> Fault | None:
        """Return the fault of the next request; None: it has none. Each kind comes once in six faults."""
        if self._random.random() >= self._share:
            return None
        self._next = self._next or self._random.sample(list(Fault), len(Fault))
        self.drawn.append(self._next.pop())
        return self.drawn[-1]

    async def answer(self, request: web.Request) -> web.StreamResponse | None:
        """Draw, and return the answer of a request that has a fault; None: it is passed on."""
        if (call := request.query.get(CALL_QUERY, "")).startswith(_LOOP):
            return self._loop(request, int(call.removeprefix(_LOOP)))
        fault = self.draw()
        if fault is None:
            return None
        transport = request.transport
        assert transport is not None
        if fault is Fault.LATE_RESET:
            asyncio.get_running_loop().call_later(self._random.uniform(0, _LATE_S), transport.abort)
            return None
        if fault is Fault.RESET:
            transport.abort()
            return web.Response(status=500)  # nobody gets it
        if fault is Fault.LOOP:
            return self._loop(request, self._random.randint(0, _LONGEST_LOOP))
        headers = {"Retry-After": "1"} if fault is Fault.RATE_LIMIT and self._random.random() < 0.5 else None
        return web.Response(status=fault.value, text="modal-http: fault\n", headers=headers)

    def _loop(self, request: web.Request, left: int) -> web.Response:
        """Redirect at once; a loop that ends has no answer, since the call has expired."""
        if left == 1:
            return web.Response(status=408, text="modal-http: Missing request\n")
        location = request.url.update_query({CALL_QUERY: f"{_LOOP}{max(0, left - 1)}"})
        return web.Response(status=303, headers={"Location": str(location)})
