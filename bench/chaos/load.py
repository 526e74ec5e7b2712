"""Clients of two keys that ask without a pause, and what became of each of their requests."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

from bench.chaos.requests import Request, draw, read

CLIENTS = 8
_FAILED_PAUSE_S, _REFUSED_PAUSE_S = 0.05, 0.25  # the second where nobody listens: all clients would ask in vain
REFUSED, CLOSED, CUT = "refused", "closed", "cut"  # no connection; closed before a byte of the answer; within it
LATE, WRONG = "late", "wrong"
_RENEWED = 0.2  # share of requests that come on a new connection
_SAID = 400  # bytes of an error


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    Attributes:
        status: Of the answer; 0: there was none.
        code: Empty: a right answer. Else the code of the error, or one of the words above.
    """

    request: Request
    status: int
    code: str
    seconds: float
    detail: str = ""

    def __str__(self) -> str:
        """Return one line on it."""
        kind = "stream" if self.request.streams else "whole"
        said = f"{self.status} {self.code or 'answered'} {self.detail}".rstrip()
        return (
            f"{self.request.path} of {self.request.model}, {kind}, {self.request.marker}: {said}, {self.seconds:.1f} s"
        )


class Load:
    """Clients that ask until `finish`.

    Args:
        url: Where the service is.
        rng: Chooses what they ask.
        models: What they ask for.
        limit_s: How long a request may take.
        clients: How many of them ask at the same time.
        constrained: Whether some ask for structured outputs.
        take: Takes what became of each request; by default it is kept until `finish`.
    """

    def __init__(
        self,
        url: str,
        rng: random.Random,
        models: list[str],
        *,
        limit_s: float,
        clients: int = CLIENTS,
        constrained: bool = True,
        take: Callable[[Outcome], None] | None = None,
    ) -> None:
        self._url, self._rng, self._models, self._limit_s = url, rng, models, limit_s
        self._ending, self._constrained = False, constrained
        self.outcomes: list[Outcome] = []
        self._take = take or self.outcomes.append
        self._clients = [asyncio.create_task(self._ask_on()) for _ in range(clients)]

    async def finish(self) -> list[Outcome]:
        """Let the clients ask no more, and return what became of all requests once they have ended."""
        self._ending = True
        await asyncio.gather(*self._clients)
        return self.outcomes

    async def _ask_on(self) -> None:
        while not self._ending:
            async with aiohttp.ClientSession() as http:
                while not self._ending:
                    request = draw(self._rng, self._models, constrained=self._constrained)
                    outcome = await ask(http, self._url, request, self._limit_s)
                    self._take(outcome)
                    if outcome.code:
                        await asyncio.sleep(_REFUSED_PAUSE_S if outcome.code == REFUSED else _FAILED_PAUSE_S)
                    if self._rng.random() < _RENEWED:
                        break


async def ask(http: aiohttp.ClientSession, url: str, request: Request, limit_s: float) -> Outcome:
    """Send a request and return what became of it."""
    began = time.monotonic()
    status, code, detail = await _exchange(http, url, request, limit_s)
    return Outcome(request, status, code, time.monotonic() - began, detail)


async def _exchange(http: aiohttp.ClientSession, url: str, request: Request, limit_s: float) -> tuple[int, str, str]:
    status, body = 0, b""
    try:
        async with (
            asyncio.timeout(limit_s),
            http.post(url + request.path, json=request.body, headers=request.headers) as answer,
        ):
            status = answer.status
            async for piece in answer.content.iter_any():
                body += piece
            told = answer.headers.get("X-Request-Id")
    except aiohttp.ClientConnectorError as error:
        return 0, REFUSED, str(error)
    except (aiohttp.ClientError, ConnectionError) as error:
        return status, CUT if status else CLOSED, f"{error!r} after {body[-60:]!r}"
    except TimeoutError:
        return status, LATE, f"after {body[-60:]!r}"
    return status, *_judge(request, status, body, told)


def _judge(request: Request, status: int, body: bytes, told: str | None) -> tuple[str, str]:
    """Return the code of an answer and what is wrong with it."""
    if told != request.marker:
        return WRONG, f"request id {told}"
    try:
        reply = read(request.path, status, body, streams=request.streams)
    except (KeyError, ValueError, TypeError, AssertionError) as error:
        return WRONG, f"{error!r} of {body[-200:]!r}"
    if reply.error:
        return reply.error[1], f"after {len(reply.text)} characters" if status == 200 else repr(body[:_SAID])
    fault = request.fault_of(reply)
    return WRONG if fault else "", fault
