"""A request for a model: its body is read, its model found, its limits counted; then it is relayed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qsl

from service.gateway import request_fields
from service.gateway.api_errors import Refusal
from service.gateway.clients import Client
from service.gateway.grammars import Grammars
from service.gateway.metrics import Account
from service.gateway.proxy import HEARTBEAT_S, Message, Receive, Relay, Send
from service.gateway.request_fields import Asked
from service.gateway.router import Directory, Target
from service.gateway.upstream import Order
from service.in_engine.vllm_service import http_contract
from service.in_engine.vllm_service.http_contract import Route

_PIECE_S = 30.0
_QUERY = {"stream", "starting_after"}  # of GET /v1/responses/<id>
_TUNED: dict[str, str | float] = {"temperature": 0.3, "tool_choice": "auto"}  # what `-local` stands for


class Inference:
    """All routes that reach an engine.

    Args:
        directory: Which pool a name stands for.
        grammars: Compiles what an output is to be like.
        hold_s: How long a request that is no stream waits for a pool.
        heartbeat_s: Seconds between the comments of a waiting stream.
    """

    def __init__(
        self, directory: Directory, grammars: Grammars, hold_s: float, heartbeat_s: float = HEARTBEAT_S
    ) -> None:
        self._directory, self._grammars = directory, grammars
        self._hold_s, self._heartbeat_s = hold_s, heartbeat_s

    async def serve(
        self, route: Route, scope: Message, receive: Receive, send: Send, *, client: Client, account: Account
    ) -> None:
        """Answer one request. The state of `scope` has the connections to the engines, as `http`.

        Raises:
            Refusal: Nothing has been sent yet, and the client is to have this answer.
            ConnectionError: The answer broke off; the client's connection must end.
        """
        with client.request():
            body = await _body(route.body_limit, scope, receive, account)
            async with _while_client_stays(receive, account):
                target, order = await self._order(route, scope, body, client, account)
                del body
                relay = Relay(
                    scope["state"]["http"],
                    target.pool,
                    order,
                    account,
                    send,
                    hold_s=self._hold_s,
                    heartbeat_s=self._heartbeat_s,
                )
                await relay.run()

    async def _order(
        self, route: Route, scope: Message, body: bytes | bytearray, client: Client, account: Account
    ) -> tuple[Target, Order]:
        path, query = scope["path"], dict(parse_qsl(scope["query_string"].decode("latin-1")))
        asked = request_fields.read(body) if route.model_from == "body" else None
        target = self._directory.find(asked.model if asked else query.get("model"))
        account.model, account.pool = target.pool.spec.key, target.pool.place
        client.check_model(target.pool.spec.key, (asked and asked.model) or target.name)
        target.pool.check(target.name)
        passed = {name: value for name, value in query.items() if name in _QUERY and not asked}
        order = Order(scope["method"], path, passed, scope["headers"], body, b"", streams=False)
        if not asked and target.pool.address() is None:  # it asks for what an engine holds
            raise Refusal(
                404, f"Model '{account.model}' has no engine now, so there is nothing of it to be had at {path}."
            )
        if asked:
            request_fields.check_lists(path, body)
            await self._grammars.check(asked)
            order.streams = account.stream = bool(asked.stream) and route.streams
            if changes := _changes(asked, target):
                order.body, order.suffix = request_fields.rewritten(body, changes)
        return target, order


def _changes(asked: Asked, target: Target) -> dict[str, str | float]:
    changes: dict[str, str | float] = {} if target.known else {"model": target.name}
    if target.tuned and asked.has_tools:
        changes |= {name: value for name, value in _TUNED.items() if not asked.sets(name)}
    return changes


async def _body(limit: int, scope: Message, receive: Receive, account: Account) -> bytes | bytearray:
    """Read a body of a bounded size, into one buffer."""
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    length = int(declared) if declared.isdigit() else limit + 1
    if length > limit:
        raise _too_large(limit)
    message = await receive()
    body: bytes | bytearray = message.get("body", b"")
    if message.get("more_body"):
        body = bytearray(body)  # it grows with what comes: what a client declares costs nothing
        while message.get("more_body"):
            message = await _more(receive)
            body += message.get("body", b"")
            if len(body) > limit:
                raise _too_large(limit)
    if message["type"] == "http.disconnect":
        account.left = True
        raise Refusal(499, "The client left before its body was here.", code="client_left")
    account.bytes_in = len(body)
    return body


async def _more(receive: Receive) -> Message:
    try:
        async with asyncio.timeout(_PIECE_S):
            return await receive()
    except TimeoutError:
        raise Refusal(408, f"Nothing more of the body came for {_PIECE_S:.0f} s.", code="body_too_slow") from None


def _too_large(limit: int) -> Refusal:
    return Refusal(413, http_contract.too_large(limit), code="body_too_large")


@asynccontextmanager
async def _while_client_stays(receive: Receive, account: Account) -> AsyncIterator[None]:
    """Cancel what runs inside when the client leaves; it is over then, without an error."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - a coroutine of a server runs in one
    watching = asyncio.ensure_future(_disconnected(receive))

    def leave(_: asyncio.Future[Any]) -> None:
        if not watching.cancelled():
            account.left = True
            task.cancel()

    watching.add_done_callback(leave)
    try:
        yield
    except asyncio.CancelledError:
        if not account.left:
            raise
        task.uncancel()
        account.status = account.status or 499
    finally:
        watching.remove_done_callback(leave)
        watching.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
