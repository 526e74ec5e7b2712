"""From one client to one pool and back: bytes in, bytes out, nothing decoded, nothing kept.

A client that leaves takes its request along: the connection to the engine is closed, and the engine stops generating.
A stream whose pool is not ready gets its headers and a comment every few seconds, so that no proxy on the way cuts it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import nullcontext
from typing import Any

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from service.gateway.api_errors import Refusal, unavailable
from service.gateway.metrics import Account
from service.gateway.pool import Address, Pool
from service.gateway.upstream import Order, Sent, data_of
from service.in_engine.vllm_service.http_contract import EVENT_STREAM, JSON

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

HEARTBEAT_S = 3.0
_TRIES = 5  # of connections that had been closed meanwhile; a pool that is gone is woken by the next try
_FOLLOW_S = 0.05
_HOP_BY_HOP = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
    b"transfer-encoding", b"upgrade", b"expect",
}  # fmt: skip
_OURS = {b"host", b"content-length", b"x-request-id", b"accept-encoding"}  # a stream that began has no encoding
_NOT_PASSED_ON = _HOP_BY_HOP | _OURS | {b"cookie", b"modal-key", b"modal-secret"}
_KEYS = {b"authorization", b"x-api-key"}
_NOT_PASSED_BACK = {name.decode() for name in _HOP_BY_HOP} | {"server", "date", "x-engine-pid", "x-request-id"}


def _close(opening: asyncio.Future[aiohttp.ClientResponse]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


class Relay:
    """One request on its way.

    Args:
        http: Connections to the engines.
        pool: Where it goes.
        order: What goes there.
        account: What is known of it.
        send: To the client.
        hold_s: How long it waits for a pool that is not ready, unless it is a stream.
        heartbeat_s: Seconds between the comments of a waiting stream.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        pool: Pool,
        order: Order,
        account: Account,
        send: Send,
        *,
        hold_s: float,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self._http, self._pool, self._order, self._account, self._send = http, pool, order, account, send
        self._hold_s, self._heartbeat_s = hold_s, heartbeat_s
        self._began = time.monotonic()
        self._started = False

    async def run(self) -> None:
        """Bring the request to the pool and its answer to the client.

        Raises:
            Refusal: Nothing has been sent yet, and the client is to have this answer.
            ConnectionError: The answer broke off where no sentence can be put: the client's connection must end.
        """
        try:
            with self._pool.use(looks=self._order.method == "GET"):
                answer = await (self._opened_beating() if self._order.streams else self._open())
                self._order.body = b""
                try:
                    with self._pool.answers() if answer.status < 500 else nullcontext():
                        await self._pass_back(answer)
                finally:
                    answer.close()
        except Refusal as refusal:
            if not self._started:
                raise
            self._account.code = refusal.code
            self._account.status = refusal.status
            await self._say(refusal.event(self._order.path), more=False)

    async def _opened_beating(self) -> aiohttp.ClientResponse:
        """Open the answer of a stream; until it comes, tell the client what it is waiting for."""
        opening = asyncio.ensure_future(self._open())
        try:
            while not (await asyncio.wait((opening,), timeout=self._heartbeat_s))[0]:
                await self._beat()
        except BaseException:  # the client left, perhaps in the moment in which the answer came
            opening.cancel()
            opening.add_done_callback(_close)
            raise
        return opening.result()

    async def _beat(self) -> None:
        if not self._started:
            headers = [(b"content-type", f"{EVENT_STREAM}; charset=utf-8".encode()), (b"cache-control", b"no-cache")]
            await self._start(200, headers)
        waited = time.monotonic() - self._began
        doing = "waking" if self._pool.state == "waking" else "waiting for"
        await self._say(f": {doing} {self._pool.spec.key} on {self._pool.place}, {waited:.0f} s\n\n".encode())

    async def _open(self) -> aiohttp.ClientResponse:
        """Return the answer, its headers read; its pool is woken when it is not there."""
        for tries_left in reversed(range(_TRIES)):
            sent = Sent()
            try:
                return await self._ask(await self._address(), sent)
            except (aiohttp.ClientError, ConnectionError) as error:
                self._pool.lost()
                if not tries_left or not sent.in_vain(error):  # an engine that this request killed is not given another
                    raise self._lost() from error
        raise AssertionError("the last try returns or raises")

    async def _address(self) -> Address:
        if address := self._pool.address():
            return address
        self._account.cold = True
        began = time.monotonic()
        try:
            if self._order.streams:
                return await self._pool.ready()
            async with asyncio.timeout(max(0.0, self._hold_s - (began - self._began))):
                return await self._pool.ready()
        except TimeoutError:
            raise self._still_waking() from None
        finally:
            self._account.held_s += time.monotonic() - began

    async def _ask(self, address: Address, sent: Sent) -> aiohttp.ClientResponse:
        order = self._order
        url = URL(address.url + order.path, encoded=True).with_query({**order.query, **address.query})
        answer = await self._http.request(
            order.method,
            url,
            data=data_of(order),
            headers=self._headers(address),
            allow_redirects=False,
            trace_request_ctx=sent,
        )
        while answer.status == 303:  # Modal's word for: it takes longer than 150 s, ask here
            answer = await self._follow(answer, address)
        return answer

    async def _follow(self, answer: aiohttp.ClientResponse, address: Address) -> aiohttp.ClientResponse:
        target = answer.url.join(URL(answer.headers.get("Location", ""), encoded=True))
        answer.release()
        if target.origin() != URL(address.url).origin():
            raise Refusal(502, f"The pool of '{self._pool.spec.key}' sent this request elsewhere.", kind="server_error")
        await asyncio.sleep(_FOLLOW_S)
        return await self._http.get(target, headers=address.headers, allow_redirects=False)

    def _headers(self, address: Address) -> CIMultiDict[str]:
        withheld = _NOT_PASSED_ON if address.passes_key else _NOT_PASSED_ON | _KEYS
        headers = CIMultiDict(
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in self._order.headers
            if name not in withheld
        )
        headers.update(address.headers)
        headers["X-Request-Id"] = self._account.id
        if self._order.method != "GET":
            headers["Content-Length"] = str(len(self._order.body) + len(self._order.suffix))
        return headers

    async def _pass_back(self, answer: aiohttp.ClientResponse) -> None:
        if self._started and answer.status != 200:
            raise await _as_refusal(answer)
        if not self._started:
            headers = [
                (name, value) for name, value in answer.raw_headers if name.decode().lower() not in _NOT_PASSED_BACK
            ]
            await self._start(answer.status, headers)
        ends_well = True
        account, send = self._account, self._send
        try:
            async for chunk in answer.content.iter_any():
                account.took(chunk)
                ends_well = chunk.endswith(b"\n\n")
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except (aiohttp.ClientError, ConnectionError) as error:
            self._pool.lost()
            if not answer.headers.get("Content-Type", "").startswith(EVENT_STREAM):
                raise ConnectionError(f"the answer of '{self._pool.spec.key}' broke off") from error
            if not ends_well:
                await self._say(b"\n\n")  # a line that was cut is not made longer
            raise self._lost() from error
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._started = True
        self._account.status = status
        headers = [*headers, (b"x-request-id", self._account.id.encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _say(self, text: bytes, *, more: bool = True) -> None:
        self._account.took(text)
        await self._send({"type": "http.response.body", "body": text, "more_body": more})

    def _lost(self) -> Refusal:
        return Refusal(
            502,
            f"The engine of '{self._pool.spec.key}' on {self._pool.place} ended during this request. Send it again: "
            "another one takes over.",
            kind="server_error",
            code="engine_lost",
        )

    def _still_waking(self) -> Refusal:
        pool, wait_s = self._pool, self._pool.retry_after_s
        return unavailable(
            f"Model '{pool.spec.key}' on {pool.place} has been waking for {pool.waking_s:.0f} s, and was waited for as "
            f"long as a request is held ({self._hold_s:g} s, SERVICE_HOLD_S). Try again in {wait_s} s, or ask for a "
            "stream: those are held until it is there.",
            "model_waking",
            wait_s,
        )


async def _as_refusal(answer: aiohttp.ClientResponse) -> Refusal:
    """Return an engine's error as one that can be told inside a stream."""
    try:
        text = await answer.text(errors="replace")
    except aiohttp.ClientError:
        text = ""
    kind, message, code, param = "server_error", text[:1000] or answer.reason or "no reason given", None, None
    if answer.content_type == JSON:
        try:
            error = (await answer.json())["error"]
            kind, message = str(error["type"]), str(error["message"])
            code, param = error.get("code"), error.get("param")
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
    return Refusal(answer.status, message, kind=kind, code=None if code is None else str(code), param=param)
