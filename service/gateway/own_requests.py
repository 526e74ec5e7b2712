"""Requests that this service makes for a client, such as the lines of a batch: no connection, and otherwise as its own.

They are booked under the client's key and count for its limits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from service.gateway.api_client import ApiClient
from service.gateway.clients import ClientRegistry
from service.gateway.http_server.exchange import ON_LEAVE
from service.gateway.metrics import RequestLog
from service.in_engine.vllm_service.api_error import Message, Receive, Send
from service.in_engine.vllm_service.http_contract import JSON

_TURN_S = 0.05
Answer = Callable[[ApiClient, Message, Receive, Send], Awaitable[RequestLog]]


@dataclass
class OwnAnswer:
    """The answer to such a request.

    Attributes:
        log: Its entry in the request log, with what the engine reported.
    """

    log: RequestLog
    status: int
    headers: dict[bytes, bytes]
    body: bytes


@dataclass
class OwnRequests:
    """Makes them.

    Args:
        answer: Answers a request of a client.
        clients: All clients.
        state: What the lifespan gave the application.
    """

    answer: Answer
    clients: ClientRegistry
    state: dict[str, object] = field(default_factory=dict)

    async def post(self, client_name: str, identity: str, path: str, body: bytes) -> OwnAnswer:
        """Make a request, and return its answer whatever its status.

        Raises:
            APIError: 401: the client has no key any more, and maybe another one has its name; 503: keys are not
                read yet.
            ConnectionError: The answer broke off.
        """
        client = self.clients.named(client_name)
        if client is None or client.identity != identity:
            raise self.clients.unknown()
        await _leave_room(client)
        headers = [(b"content-type", JSON.encode())]
        scope: Message = {
            **{"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers},
            **{"state": dict(self.state), "extensions": {ON_LEAVE: lambda _: None}},
        }
        started: list[Message] = []
        pieces: list[bytes] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                started.append(message)
            else:
                pieces.append(message.get("body", b""))

        log = await self.answer(client, scope, receive, send)
        return OwnAnswer(log, log.status, dict(started[0]["headers"]), b"".join(pieces))


async def _leave_room(client: ApiClient) -> None:
    """Wait until the client has room for one more request beside this one, where its requests at once are limited."""
    while (most := client.limits.concurrency) is not None and client.running >= max(1, most - 1):  # noqa: ASYNC110 - any end
        await asyncio.sleep(_TURN_S)
