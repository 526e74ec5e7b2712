"""Forwards one request to its pool, and the answer to the client, as bytes: nothing is decoded or buffered whole.

When the client leaves, the connection to the engine is closed, and the engine stops generating. A stream that is
silent, because its pool or its engine is not ready, gets comments, so that no proxy in between closes the connection.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import lru_cache
from urllib.parse import quote

from service.gateway import platform_errors
from service.gateway.held import HeldRequest, HeldRequests
from service.gateway.http_client.answer import Answer, ConnectError, EngineConnectionError
from service.gateway.http_client.connections import Connections
from service.gateway.http_client.head import query_string, request_head, request_target
from service.gateway.metrics import RequestLog
from service.gateway.pool import Endpoint, Pool
from service.gateway.redirects import RedirectError, Redirects
from service.gateway.tracing import waiting
from service.gateway.upstream import Attempt, UpstreamRequest, body_pieces, inline_body, is_own_shortage
from service.in_engine.vllm_service import engine_errors, usage_report
from service.in_engine.vllm_service.api_error import APIError, Send, request_id_headers
from service.in_engine.vllm_service.http_contract import (
    BATCH_HEADER,
    CLIENT_HEADER,
    EVENT_STREAM,
    JSON,
    KEY_HEADERS,
    STREAM_HEADERS,
)
from service.in_engine.vllm_service.stream_comments import INTERVAL_S, StreamComments, comment
from service.in_engine.vllm_service.usage_report import REPLICA_HEADER, USAGE_HEADER
from service.usage import money

_log = logging.getLogger(__name__)
_TRIES = 5  # each may get a connection that the engine has closed; the next try wakes a pool that has ended
_NOT_YET = {429, 502, 504}  # of Modal's proxy about an answer that it may still have
_ERROR_BODY, _SHOWN = 64 * 1024, 300  # bytes of an error answer that are read, and that the log shows
_HOP_BY_HOP = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
    b"transfer-encoding", b"upgrade", b"expect",
}  # fmt: skip
COST_HEADER = b"x-report-cost"  # a client that sends it is told what its request costs: a stream in its last comment
_COST_ANSWER = b"x-cost-usd"
# What an engine gets of a client's headers. Others of vLLM's choose a data parallel rank or a priority, which is no
# client's business, or are the gateway's own: it has decoded the body, and its comments in a stream are not compressed.
_REQUEST_HEADERS = frozenset((
    b"content-type", b"accept", b"user-agent", b"traceparent", b"tracestate", b"anthropic-version", b"anthropic-beta",
    b"x-session-id",
))  # fmt: skip
_REQUEST_AND_KEY_HEADERS = _REQUEST_HEADERS.union(KEY_HEADERS)
_OWN_LINES = b"x-request-id: %b\r\n" + CLIENT_HEADER + b": %b\r\n"
_ANSWER_HEADERS_DROPPED = _HOP_BY_HOP | {
    b"server", b"date", b"x-engine-pid", b"x-request-id", b"request-id", REPLICA_HEADER, USAGE_HEADER,
}  # fmt: skip


@lru_cache(256)
def _quoted(name: str) -> bytes:
    return quote(name).encode()


def _headers_of(answer: Answer, own: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers of an engine's answer for the client, and our own instead of those of the same names."""
    dropped = _ANSWER_HEADERS_DROPPED | {name for name, _ in own} if own else _ANSWER_HEADERS_DROPPED
    return [header for header in answer.headers if header[0] not in dropped] + own


class ProxiedRequest:
    """The forwarding of one request.

    Args:
        http: Connections to the engines.
        pool: The pool that answers it.
        request: What the engine gets.
        log: Its entry in the request log.
        send: Sends to the client.
        held: All held requests.
        own_headers: Returns what the gateway adds to the headers of the answer.
        hold_s: How long it waits for a pool that is not ready, unless it is a stream.
        comment_interval_s: How long a stream may be silent before it gets a comment.
        write_now: Writes a piece of the body that need not wait for the client; None: the server has none such.
    """

    def __init__(
        self,
        http: Connections,
        pool: Pool,
        request: UpstreamRequest,
        log: RequestLog,
        send: Send,
        *,
        held: HeldRequests,
        own_headers: Callable[[], list[tuple[bytes, bytes]]],
        hold_s: float,
        comment_interval_s: float = INTERVAL_S,
        write_now: Callable[[bytes], bool] | None = None,
    ) -> None:
        self._write_now = write_now
        self._held_requests, self._own_headers = held, own_headers
        self._held: HeldRequest | None = None
        self._http, self._pool, self._request, self._log, self._send = http, pool, request, log, send
        self._hold_s, self._comment_interval_s = hold_s, comment_interval_s
        self._began = time.monotonic()
        self._started = self._passes_modal = False
        self._comments: StreamComments | None = None

    async def run(self) -> None:
        """Forward the request to the pool and the answer to the client.

        Raises:
            APIError: Nothing has been sent yet, and the client must get this answer.
            ConnectionError: The answer broke off where no error can be inserted: the client's connection must end.
        """
        try:
            with self._pool.track_request(keep_alive=self._request.method != "GET"):
                if self._request.streams:
                    self._comments = self._new_comments()
                answer = await self._open()
                self._request.release()
                try:
                    with self._pool.track_response() if answer.status < 500 else nullcontext():
                        await self._pass_back(answer)
                finally:
                    answer.close()
        except APIError as error:
            if trace := self._log.trace:
                trace.end_call(error.code)
            if self._comments:
                await self._comments.finish_comment()
            if not self._started:
                raise
            self._log.code = error.code
            self._log.status = error.status
            await self._send_text(error.event(self._request.path, self._log.id), more=False)
        finally:
            if self._comments:
                self._comments.stop()
                self._comments = None  # they refer to each other, and garbage is collected rarely
            if trace := self._log.trace:
                trace.end_call(self._log.code)
            self._count_cost()

    def _count_cost(self) -> None:
        self._log.cost = money.cost(self._log.usage, self._pool.dollars_per_hour)
        self._log.dollars = money.dollars(self._log.usage, self._pool.spec.price, self._log.cost)

    def _new_comments(self) -> StreamComments:
        return StreamComments(self._send, self._send_comment, self._comment_interval_s)

    async def _send_comment(self) -> None:
        """Say what the client is waiting for; before the engine has answered, the stream's headers come first."""
        if not self._started:
            content_type = (b"content-type", f"{EVENT_STREAM}; charset=utf-8".encode())
            await self._start(200, [content_type, *STREAM_HEADERS], self._send)
        waited = time.monotonic() - self._began
        doing = "waking" if self._pool.state == "waking" else "waiting for"
        text = f"{doing} {self._pool.spec.key} on {self._pool.location}, {waited:.0f} s"
        if self._held:
            left_s = self._pool.left_s
            text += (f", about {left_s:.0f} s left" if left_s else "") + f", position {self._held.position}"
        await self._send_text(comment(self._request.path, text))

    async def _open(self) -> Answer:
        """Return the answer once its headers are read; wake the pool when it is not ready."""
        for tries_left in reversed(range(_TRIES)):
            attempt = Attempt()
            try:
                return await self._request_answer(await self._find_endpoint(), attempt)
            except (ConnectError, EngineConnectionError) as error:
                if is_own_shortage(error):
                    raise self._too_many_connections() from error
                self._pool.mark_unreachable()
                if trace := self._log.trace:
                    trace.end_call("engine_lost")
                # a request that may have killed its engine must not kill the next one
                if not tries_left or not attempt.is_safe_to_retry(error):
                    raise self._lost() from error
        raise AssertionError("the last try returns or raises")

    async def _find_endpoint(self) -> Endpoint:
        self._pool.check_spending()
        if endpoint := self._pool.endpoint():
            return endpoint
        self._log.cold = True
        began = time.monotonic()
        try:
            with self._held_requests.hold(self._pool, self._log.key) as self._held, waiting(self._log, self._pool):
                self._log.is_held = True
                if self._request.streams:
                    return await self._pool.ready()
                async with asyncio.timeout(max(0.0, self._hold_s - (began - self._began))):
                    return await self._pool.ready()
        except TimeoutError:
            raise self._still_waking() from None
        finally:
            self._held, self._log.is_held = None, False
            self._log.held_s += time.monotonic() - began

    async def _request_answer(self, endpoint: Endpoint, attempt: Attempt) -> Answer:
        request = self._request
        query = query_string({**request.query, **endpoint.query}) if request.query else endpoint.query_string
        target = request_target(request.path, query)
        attempt.passes_modal = self._passes_modal = endpoint.own_calls is not None
        answer = await self._http.request(
            endpoint.origin,
            self._head(endpoint, target) + inline_body(request),
            body_pieces(request),
            attempt.mark_reused,
        )
        if answer.status != 303:
            return answer
        attempt.was_queued = True  # from here on only its answer is asked for
        try:
            return await self._answer_later(answer, endpoint, endpoint.url + target)
        except RedirectError as error:
            self._pool.mark_unreachable()
            raise platform_errors.of_redirect(error, self._pool.spec.key, self._pool.location) from error

    async def _answer_later(self, answer: Answer, endpoint: Endpoint, url: str) -> Answer:
        """Return the answer from where Modal redirects to, once it is there."""
        redirects = Redirects(url, endpoint.answer_s)
        answer.close()
        target = redirects.target(answer)
        while True:
            await redirects.pause()
            if endpoint.own_calls:
                await endpoint.own_calls.wait()
            try:
                answer = await self._http.get(target, endpoint.headers)
            except (ConnectError, EngineConnectionError) as error:
                if is_own_shortage(error):
                    raise
                continue
            if answer.status != 303 and (answer.status not in _NOT_YET or answer.media_type == JSON):
                return answer
            answer.close()
            if answer.status == 303:
                target = redirects.target(answer)

    def _head(self, endpoint: Endpoint, target: str) -> bytes:
        request, passed = self._request, _REQUEST_AND_KEY_HEADERS if endpoint.forwards_client_key else _REQUEST_HEADERS
        headers, trace = request.headers, self._log.trace
        if trace:
            headers = trace.begin_call(self._pool, endpoint.url, headers, streams=request.streams)
        lines = [b"%b: %b\r\n" % header for header in headers if header[0] in passed]
        lines.append(_OWN_LINES % (self._log.id.encode(), _quoted(self._log.key)))
        if self._log.is_batch:
            lines.append(BATCH_HEADER + b": 1\r\n")
        count = len(lines) + len(endpoint.headers) + 2
        if request.method != "GET":
            lines.append(b"content-length: %d\r\n" % (len(request.body) + len(request.suffix)))
            count += 1
        return request_head(request.method, target, endpoint.header_lines + b"".join(lines), count)

    async def _pass_back(self, answer: Answer) -> None:
        self._log.replica = answer.header(REPLICA_HEADER) or None
        if answer.status >= 400:
            raise await self._error_of(answer)
        self._log.usage = usage_report.parse(answer.header(USAGE_HEADER).encode())
        comments = await self._comments_in(answer)
        log, send = self._log, comments.send if comments else self._send
        headers = _headers_of(answer, STREAM_HEADERS if comments else [])
        reports_cost = any(name == COST_HEADER for name, _ in self._request.headers)
        if reports_cost and not comments:
            self._count_cost()
            headers += [(_COST_ANSWER, b"%.8f" % log.dollars)] if log.dollars is not None else []
        if comments and not self._started:
            await self._start(answer.status, headers, send)
        try:
            has_ended = await self._pass_body(answer, headers, comments, ends=not (comments and reports_cost))
        except EngineConnectionError as error:
            raise await self._broken_off(comments) from error
        if not self._started:  # it has no body
            await self._start(answer.status, headers, send)
        if comments and comments.ends_event and reports_cost:
            self._count_cost()
            if log.dollars is not None:
                text = comment(self._request.path, f"cost {log.dollars:.8f} USD")
                await send({"type": "http.response.body", "body": text, "more_body": True})
        if not has_ended:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        if comments and (event := engine_errors.last_event(self._request.path, log.tail)):
            log.status, log.code = event.status, event.code
            if event.status >= 500:
                self._log_failure(event.status, event.message.encode())

    async def _pass_body(
        self, answer: Answer, headers: list[tuple[bytes, bytes]], comments: StreamComments | None, *, ends: bool
    ) -> bool:
        """Pass the body on; return whether its end was sent too, which shares a packet with the last bytes."""
        log, send, more = self._log, comments.send if comments else self._send, True
        pass_on = self._pass_now if comments and self._write_now else None
        while received := await answer.read(pass_on):
            if not self._started:  # with the first bytes: until they are here, there can be an error in its place
                await self._start(answer.status, headers, send)
            chunk, usage = usage_report.without_comment(received) if comments else (received, None)
            log.usage = usage or log.usage
            more = not (ends and answer.has_ended)
            if chunk:
                log.record_chunk(chunk)
            if chunk or not more:
                await send({"type": "http.response.body", "body": chunk, "more_body": more})
        return not more

    def _pass_now(self, received: bytes) -> bool:
        """Pass bytes of a stream on at once; false: they must wait."""
        chunk, usage = usage_report.without_comment(received)
        comments, write_now = self._comments, self._write_now
        if not (chunk and self._started and comments and write_now and comments.pass_now(chunk, write_now)):
            return False
        self._log.usage = usage or self._log.usage
        self._log.record_chunk(chunk)
        return True

    async def _broken_off(self, comments: StreamComments | None) -> Exception:
        """Return the error of an answer that broke off; one that has begun and is no stream must look incomplete."""
        self._pool.mark_unreachable()
        if self._started and not comments:
            return ConnectionError(f"the answer of '{self._pool.spec.key}' broke off")
        if comments and not comments.ends_event:
            await self._send_text(b"\n\n")  # end the line that broke off, so that the error is an event of its own
        return self._lost()

    async def _comments_in(self, answer: Answer) -> StreamComments | None:
        """Return what sends comments in an engine's answer; None: it is no stream."""
        if self._comments:
            await self._comments.finish_comment()
        if answer.header(b"content-type").startswith(EVENT_STREAM):
            self._comments = self._comments or self._new_comments()
        elif self._comments:
            self._comments.stop()
            self._comments = None
        return self._comments

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]], send: Send) -> None:
        self._started = True
        self._log.status = status
        headers = [*headers, *request_id_headers(self._request.path, self._log.id), *self._own_headers()]
        await send({"type": "http.response.start", "status": status, "headers": headers})

    async def _send_text(self, text: bytes, *, more: bool = True) -> None:
        self._log.record_chunk(text)
        await self._send({"type": "http.response.body", "body": text, "more_body": more})

    async def _error_of(self, answer: Answer) -> APIError:
        """Return the error that a pool's answer stands for; one that is not the client's is logged."""
        body = b""
        with suppress(EngineConnectionError):
            while len(body) < _ERROR_BODY and (chunk := await answer.read()):
                body += chunk
        is_engines = answer.media_type == JSON
        if answer.status >= 500 or not is_engines:
            self._log_failure(answer.status, body, "engine of" if is_engines else "proxy before")
        if self._passes_modal and not is_engines and (limit := platform_errors.of_limit(answer, self._pool.spec.key)):
            return limit
        if not is_engines:  # a proxy's in between: its URL or its token is out of date, which the next wake will tell
            self._pool.mark_unreachable()
            return self._lost()
        error = engine_errors.from_answer(self._request.path, answer.status, body)
        told = {
            name: value for name in ("Retry-After", "x-should-retry") if (value := answer.header(name.lower().encode()))
        }
        error.headers = told or error.headers
        return error

    def _log_failure(self, status: int, words: bytes, who: str = "engine of") -> None:
        shown = " ".join(words[:_SHOWN].decode(errors="replace").split())
        key = self._pool.spec.key
        _log.warning("request %s: the %s '%s' answered %d: %s", self._log.id, who, key, status, shown)

    def _lost(self) -> APIError:
        return engine_errors.engine_lost(f"The engine of '{self._pool.spec.key}' on {self._pool.location}")

    def _too_many_connections(self) -> APIError:
        message = f"No connection to the engine of '{self._pool.spec.key}' is left for this request. Send it again."
        return APIError(503, message, code="too_many_connections", retry_after_s=1)

    def _still_waking(self) -> APIError:
        pool, wait_s = self._pool, self._pool.retry_after_s
        return APIError(
            503,
            f"Model '{pool.spec.key}' on {pool.location} has been waking for {pool.waking_s:.0f} s. A request is held "
            f"for at most {self._hold_s:g} s (SERVICE_HOLD_S). Try again in {wait_s} s, or ask for a stream: that is "
            "held until the model is ready.",
            code="model_waking",
            retry_after_s=wait_s,
        )
