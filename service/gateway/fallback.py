"""Another model answers while the wanted one's pool is cold, failed or full, where the request or its entry allows it.

The wanted pool is woken all the same, so that a later request gets it. A fallback only ever improves an answer: where
it fails too, the request waits for the wanted model as if there were none.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from service.gateway.metrics import RequestLog
from service.gateway.pool import Pool
from service.gateway.tracing import waiting
from service.gateway.upstream import UpstreamRequest
from service.in_engine.vllm_service.api_error import APIError, Message, Send
from service.registry.models import ModelSpec

ASKED, SERVED = "X-Fallback", "X-Served-Model"
GRACE_S = 1.0  # a pool that is ready so soon after its wake began is not cold: on Modal it only has to be asked
_UNAVAILABLE = {429, 503}


@dataclass(frozen=True)
class Target:
    """A pool that may answer a request, and what its engine would get."""

    pool: Pool
    request: UpstreamRequest


Forward = Callable[[Pool, UpstreamRequest, Send], Awaitable[None]]


def is_allowed(spec: ModelSpec, headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Tell whether another model may answer a request for this one: its header decides, else the entry.

    Raises:
        APIError: 400: the header has another value.
    """
    asked = dict(headers).get(ASKED.lower().encode(), b"").decode("latin-1").strip().lower()
    if asked not in {"", "allow", "deny"}:
        raise APIError(400, f"{ASKED}: '{asked[:40]}' is neither allow nor deny.", code="invalid_header")
    return (asked or spec.fallback_default) == "allow"


class Fallback:
    """The answering of one request by the first of several pools that can.

    Args:
        wanted: The pool of the requested model.
        others: Those of its fallbacks, in their order.
        forward: Forwards a request to a pool and the answer to the client, as `ProxiedRequest.run` does.
        send: Sends to the client.
        log: The request's entry in the request log.
        on_release: Called once the body is not needed any more.
    """

    def __init__(
        self,
        wanted: Target,
        others: Sequence[Target],
        forward: Forward,
        send: Send,
        *,
        log: RequestLog,
        on_release: Callable[[], None],
    ) -> None:
        self._wanted, self._others, self._forward = wanted, others, forward
        self._send, self._log, self._on_release = send, log, on_release
        self._holds = ExitStack()

    async def run(self) -> None:
        """Answer the request.

        Raises:
            APIError: Nothing has been sent yet, and the client must get this answer: the wanted pool's.
            ConnectionError: The answer broke off; the client's connection must end.
        """
        refusal = None
        with self._holds:
            for target in self._others:  # a local engine in use is not evicted for the wake that begins here
                self._holds.enter_context(target.pool.track_request(keep_alive=False))
            if not self._wanted.pool.is_full and await self._is_ready_soon(self._wanted.pool):
                refusal = await self._try(self._wanted)
                if refusal is None:
                    return
                if refusal.status not in _UNAVAILABLE:
                    raise refusal
            for target in self._others:
                if await self._is_ready(target.pool) and await self._is_answered_by(target):
                    return
        if refusal := refusal or await self._try(self._wanted):
            raise refusal

    async def _is_answered_by(self, target: Target) -> bool:
        """Have a fallback answer; an error of it is not the client's."""
        log, spec = self._log, target.pool.spec
        wanted = log.model, log.pool
        log.model, log.pool, log.fallback_for = spec.key, target.pool.location, log.model
        if await self._try(target):
            (log.model, log.pool), log.fallback_for = wanted, None
            return False
        return True

    async def _try(self, target: Target) -> APIError | None:
        """Forward the request; return the error that it was answered with before anything was sent."""

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._settle_on(target)
                if self._log.fallback_for:
                    message["headers"] = [*message["headers"], (SERVED.lower().encode(), self._log.model.encode())]
            await self._send(message)

        try:
            await self._forward(target.pool, target.request, send)
        except APIError as error:
            return error
        return None

    def _settle_on(self, target: Target) -> None:
        """Try no other any more: its answer, or a comment that it is waited for, is being sent."""
        self._holds.close()
        for other in (self._wanted, *self._others):
            if other is not target:
                other.request.release()
        if target.request.body:  # only a comment was sent
            target.request.on_release = self._on_release
        else:
            self._on_release()

    async def _is_ready(self, pool: Pool) -> bool:
        """Tell whether a fallback's pool is ready; wakes none that is cold."""
        return pool.endpoint() is not None or (await pool.probe() == "ready" and await self._is_ready_soon(pool))

    async def _is_ready_soon(self, pool: Pool) -> bool:
        """Wake a pool, and tell whether it is ready before the grace is over."""
        if pool.endpoint():
            return True
        began = time.monotonic()
        try:
            with waiting(self._log, pool):
                async with asyncio.timeout(max(0.0, GRACE_S - pool.waking_s)):
                    await pool.ready()
        except (TimeoutError, APIError):
            return False
        finally:
            self._log.held_s += time.monotonic() - began
        self._log.cold = True
        return True
