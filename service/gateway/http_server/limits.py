"""What a client may take of the server, and what all of its connections share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from service.gateway.http_server.addresses import AddressCounts
from service.gateway.http_server.exchange import App
from service.gateway.http_server.sockets import has_unread
from service.in_engine.vllm_service.api_error import APIError
from service.in_engine.vllm_service.http_contract import ALL_HEADS_LIMIT, HEAD_LIMIT
from service.in_engine.vllm_service.incomplete_heads import IncompleteHeads

if TYPE_CHECKING:
    from service.gateway.http_server.connection import Connection

_MARGIN_S = 1.0  # a request that is sent just within the time that its client was told is still on its way then


@dataclass(frozen=True)
class Limits:
    """What a client may take.

    Attributes:
        connections: Connections at a time, of all clients.
        address_connections: Connections at a time of one address of another machine; see `AddressCounts`.
        keep_alive_s: Seconds without a request after which a connection is closed; clients are told fewer.
        first_byte_s: Seconds until the first byte on a new connection.
        head_s: Seconds from the first byte of a request's head to its last.
        rest_s: Seconds for the rest of a short body that the application does not read.
        linger_s: Seconds for which the rest of what a refused client sends is dropped.
        silence_s: Of these, seconds without a byte.
        write_s: Seconds for which a client may read nothing of its answer, once all buffers are full.
        head_bytes: Bytes of a request line and its headers.
        all_heads_bytes: Bytes of memory that the incomplete heads of all connections take.
        linger_bytes: Bytes that are dropped of a refused client.
    """

    connections: int = 4096
    address_connections: int = 2048
    keep_alive_s: float = 620.0
    first_byte_s: float = 30.0
    head_s: float = 15.0
    rest_s: float = 30.0
    linger_s: float = 30.0
    silence_s: float = 5.0
    write_s: float = 300.0
    head_bytes: int = HEAD_LIMIT
    all_heads_bytes: int = ALL_HEADS_LIMIT
    linger_bytes: int = 256 * 1024 * 1024


@dataclass(eq=False)
class Shared:
    """What all connections of a server share.

    Attributes:
        app: Answers.
        limits: What each client may take.
        on_late_request: Called where a request crosses the close of an idle connection, and is lost.
        state: The lifespan's, copied into each scope.
        date: The `date` header of this second.
        connections: Every open one.
        waiting: Those without a request; the one that has waited longest is the first.
        tasks: Answers in progress.
        empty: Set while no connection is open.
        stopping: Each answer is the last of its connection.
    """

    app: App
    limits: Limits
    on_late_request: Callable[[], None] = lambda: None
    state: dict[str, Any] = field(default_factory=dict)
    date: bytes = b""
    connections: set[Connection] = field(default_factory=set)
    waiting: dict[Connection, None] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    empty: asyncio.Event = field(default_factory=asyncio.Event)
    stopping: bool = False

    def __post_init__(self) -> None:
        """Compose the end of a head that leaves its connection open."""
        told_s = self.limits.keep_alive_s - _MARGIN_S
        self.keep_alive = b"\r\nconnection: keep-alive\r\nkeep-alive: timeout=%d\r\n\r\n" % told_s
        self.addresses = AddressCounts(self.limits.address_connections)
        self.heads: IncompleteHeads[Connection] = IncompleteHeads(self.limits.all_heads_bytes)
        self.empty.set()

    def make_room(self) -> APIError | None:
        """With too many connections close the one that waits longest; return an error where none waits.

        One with a request that is not read yet is closed only where all have one.
        """
        if len(self.connections) <= self.limits.connections:
            return None
        if not self.waiting:
            message = "This service has too many connections. Try again in a second."
            return APIError(503, message, code="too_many_connections", retry_after_s=1)
        idle = (one for one in self.waiting if not has_unread(one.transport))
        next(idle, next(iter(self.waiting))).close()
        return None
