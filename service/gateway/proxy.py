"""Forwards one request to its pool, and the answer to the client, as bytes: nothing is decoded or buffered whole.

When the client leaves, the connection to the engine is closed, and the engine stops generating. A stream whose pool is
not ready gets its headers and a comment every few seconds, so that no proxy in between closes the connection.
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

from service.gateway.api_errors import APIError, unavailable
from service.gateway.metrics import RequestLog
from service.gateway.pool import Endpoint, Pool
from service.gateway.upstream import Attempt, UpstreamRequest, request_body
from service.in_engine.vllm_service.http_contract import EVENT_STREAM, JSON

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

COMMENT_INTERVAL_S = 3.0
_TRIES = 5  # each may get a connection that the engine has closed; the next try wakes a pool that has ended
_FOLLOW_S = 0.05
_HOP_BY_HOP = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
    b"transfer-encoding", b"upgrade", b"expect",
}  # fmt: skip
# accept-encoding: the gateway's comments at the beginning of a stream are not compressed, so nothing may be
_OURS = {b"host", b"content-length", b"x-request-id", b"accept-encoding"}
_REQUEST_HEADERS_DROPPED = _HOP_BY_HOP | _OURS | {b"cookie", b"modal-key", b"modal-secret"}
_KEYS = {b"authorization", b"x-api-key"}
_ANSWER_HEADERS_DROPPED = {name.decode() for name in _HOP_BY_HOP} | {"server", "date", "x-engine-pid", "x-request-id"}


def _close(opening: asyncio.Future[aiohttp.ClientResponse]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


class ProxiedRequest:
    """The forwarding of one request.

    Args:
        http: Connections to the engines.
        pool: The pool that answers it.
        request: What the engine gets.
        log: Its entry in the request log.
        send: Sends to the client.
        hold_s: How long it waits for a pool that is not ready, unless it is a stream.
        comment_interval_s: Seconds between the comments of a waiting stream.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        pool: Pool,
        request: UpstreamRequest,
        log: RequestLog,
        send: Send,
        *,
        hold_s: float,
        comment_interval_s: float = COMMENT_INTERVAL_S,
    ) -> None:
        self._http, self._pool, self._request, self._log, self._send = http, pool, request, log, send
        self._hold_s, self._comment_interval_s = hold_s, comment_interval_s
        self._began = time.monotonic()
        self._started = False

    async def run(self) -> None:
        """Forward the request to the pool and the answer to the client.

        Raises:
            APIError: Nothing has been sent yet, and the client must get this answer.
            ConnectionError: The answer broke off where no error can be inserted: the client's connection must end.
        """
        try:
            with self._pool.track_request(keep_alive=self._request.method != "GET"):
                answer = await (self._open_with_comments() if self._request.streams else self._open())
                self._request.body = b""
                try:
                    with self._pool.track_response() if answer.status < 500 else nullcontext():
                        await self._pass_back(answer)
                finally:
                    answer.close()
        except APIError as error:
            if not self._started:
                raise
            self._log.code = error.code
            self._log.status = error.status
            await self._send_text(error.event(self._request.path), more=False)

    async def _open_with_comments(self) -> aiohttp.ClientResponse:
        """Open the answer of a stream; until then, send the client comments that say what it is waiting for."""
        opening = asyncio.ensure_future(self._open())
        try:
            while not (await asyncio.wait((opening,), timeout=self._comment_interval_s))[0]:
                await self._send_comment()
        except BaseException:  # the client left, perhaps just as the answer came
            opening.cancel()
            opening.add_done_callback(_close)
            raise
        return opening.result()

    async def _send_comment(self) -> None:
        if not self._started:
            headers = [(b"content-type", f"{EVENT_STREAM}; charset=utf-8".encode()), (b"cache-control", b"no-cache")]
            await self._start(200, headers)
        waited = time.monotonic() - self._began
        doing = "waking" if self._pool.state == "waking" else "waiting for"
        await self._send_text(f": {doing} {self._pool.spec.key} on {self._pool.location}, {waited:.0f} s\n\n".encode())

    async def _open(self) -> aiohttp.ClientResponse:
        """Return the answer once its headers are read; wake the pool when it is not ready."""
        for tries_left in reversed(range(_TRIES)):
            attempt = Attempt()
            try:
                return await self._request_answer(await self._find_endpoint(), attempt)
            except (aiohttp.ClientError, ConnectionError) as error:
                self._pool.mark_unreachable()
                # a request that may have killed its engine must not kill the next one
                if not tries_left or not attempt.is_safe_to_retry(error):
                    raise self._lost() from error
        raise AssertionError("the last try returns or raises")

    async def _find_endpoint(self) -> Endpoint:
        if endpoint := self._pool.endpoint():
            return endpoint
        self._log.cold = True
        began = time.monotonic()
        try:
            if self._request.streams:
                return await self._pool.ready()
            async with asyncio.timeout(max(0.0, self._hold_s - (began - self._began))):
                return await self._pool.ready()
        except TimeoutError:
            raise self._still_waking() from None
        finally:
            self._log.held_s += time.monotonic() - began

    async def _request_answer(self, endpoint: Endpoint, attempt: Attempt) -> aiohttp.ClientResponse:
        request = self._request
        url = URL(endpoint.url + request.path, encoded=True).with_query({**request.query, **endpoint.query})
        answer = await self._http.request(
            request.method,
            url,
            data=request_body(request),
            headers=self._headers(endpoint),
            allow_redirects=False,
            trace_request_ctx=attempt,
        )
        while answer.status == 303:  # Modal answers so after 150 s: the answer will be at this location
            answer = await self._follow(answer, endpoint)
        return answer

    async def _follow(self, answer: aiohttp.ClientResponse, endpoint: Endpoint) -> aiohttp.ClientResponse:
        target = answer.url.join(URL(answer.headers.get("Location", ""), encoded=True))
        answer.release()
        if target.origin() != URL(endpoint.url).origin():
            raise APIError(
                502,
                f"The pool of '{self._pool.spec.key}' redirected this request to another host.",
                kind="server_error",
            )
        await asyncio.sleep(_FOLLOW_S)
        return await self._http.get(target, headers=endpoint.headers, allow_redirects=False)

    def _headers(self, endpoint: Endpoint) -> CIMultiDict[str]:
        withheld = _REQUEST_HEADERS_DROPPED if endpoint.forwards_client_key else _REQUEST_HEADERS_DROPPED | _KEYS
        headers = CIMultiDict(
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in self._request.headers
            if name not in withheld
        )
        headers.update(endpoint.headers)
        headers["X-Request-Id"] = self._log.id
        if self._request.method != "GET":
            headers["Content-Length"] = str(len(self._request.body) + len(self._request.suffix))
        return headers

    async def _pass_back(self, answer: aiohttp.ClientResponse) -> None:
        if self._started and answer.status != 200:
            raise await _as_api_error(answer)
        if not self._started:
            headers = [
                (name, value)
                for name, value in answer.raw_headers
                if name.decode().lower() not in _ANSWER_HEADERS_DROPPED
            ]
            await self._start(answer.status, headers)
        ends_well = True
        log, send = self._log, self._send
        try:
            async for chunk in answer.content.iter_any():
                log.record_chunk(chunk)
                ends_well = chunk.endswith(b"\n\n")
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except (aiohttp.ClientError, ConnectionError) as error:
            self._pool.mark_unreachable()
            if not answer.headers.get("Content-Type", "").startswith(EVENT_STREAM):
                raise ConnectionError(f"the answer of '{self._pool.spec.key}' broke off") from error
            if not ends_well:
                await self._send_text(b"\n\n")  # end the line that broke off, so that the error is an event of its own
            raise self._lost() from error
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._started = True
        self._log.status = status
        headers = [*headers, (b"x-request-id", self._log.id.encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _send_text(self, text: bytes, *, more: bool = True) -> None:
        self._log.record_chunk(text)
        await self._send({"type": "http.response.body", "body": text, "more_body": more})

    def _lost(self) -> APIError:
        return APIError(
            502,
            f"The engine of '{self._pool.spec.key}' on {self._pool.location} ended during this request. Send it again: "
            "another engine takes over.",
            kind="server_error",
            code="engine_lost",
        )

    def _still_waking(self) -> APIError:
        pool, wait_s = self._pool, self._pool.retry_after_s
        return unavailable(
            f"Model '{pool.spec.key}' on {pool.location} has been waking for {pool.waking_s:.0f} s. A request is held "
            f"for at most {self._hold_s:g} s (SERVICE_HOLD_S). Try again in {wait_s} s, or ask for a stream: that is "
            "held until the model is ready.",
            "model_waking",
            wait_s,
        )


async def _as_api_error(answer: aiohttp.ClientResponse) -> APIError:
    """Return an engine's error answer as an error that can be sent inside a stream."""
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
    return APIError(answer.status, message, kind=kind, code=None if code is None else str(code), param=param)
