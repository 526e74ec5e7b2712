"""`GET /v1/requests`: the requests that run and the last ones that have ended. Metadata alone, in bounded memory.

Kept are requests for an engine's work, those that a limit refused included; what only reads the service is not.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request

from service.gateway.pages import number_of

if TYPE_CHECKING:
    from service.gateway.api_client import ApiClient
    from service.gateway.metrics import RequestLog

KEPT = 1000
_PAGE = 200  # rows, unless the query says how many
PAGE_BYTES = 64 * 1024  # of an answer's rows
MOST_RUNNING = 100  # rows, of 330 bytes with the longest names
_PATH = 64  # characters
COLUMNS = (
    "number", "ended_at", "id", "key", "model", "gpu", "path", "stream", "status", "code", "client_left", "held_s",
    "first_byte_s", "seconds", "tokens_in", "tokens_cached", "tokens_out", "cost", "dollars", "replica",
)  # fmt: skip
RUNNING_COLUMNS = ("id", "key", "model", "gpu", "path", "stream", "held", "first_byte_s", "seconds", "bytes_out")
_KEY = COLUMNS.index("key")
_ID = COLUMNS.index("id")


class RecentRequests:
    """The requests of one gateway.

    Args:
        kept: How many of those that have ended.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._running: dict[int, RequestLog] = {}
        self._ended: deque[tuple[Any, ...]] = deque(maxlen=kept)
        self._number = 0

    @property
    def running(self) -> int:
        """How many have not ended."""
        return len(self._running)

    def begin(self, log: RequestLog) -> None:
        """Take a request that has arrived."""
        self._running[id(log)] = log

    def end(self, log: RequestLog, tokens: tuple[int, int] | None) -> None:
        """Take a request that has ended."""
        self._running.pop(id(log), None)
        if not _is_kept(log):
            return
        self._number += 1
        self._ended.append(
            (
                self._number,
                time.time(),
                log.id,
                log.key,
                log.model,
                log.pool,
                log.path[:_PATH],
                log.stream,
                499 if log.client_left else log.status,
                log.code,
                log.client_left,
                log.held_s,
                log.first_byte_s,
                time.perf_counter() - log.began,
                *(tokens or (None, None))[:1],
                log.usage.tokens_cached if log.usage else None,
                *(tokens or (None, None))[1:],
                log.cost,
                log.dollars,
                log.replica,
            )
        )

    def answer(self, request: Request) -> bytes:
        """Return the JSON of the answer: rows as lists, by the names in `columns`, the newest first.

        `number` counts requests. A page has those below `before` and above `after`; `more` tells whether further ones
        lie before its last. With `id` it has the request of that id alone.

        Raises:
            APIError: 400: a field of the query is wrong.
        """
        client: ApiClient = request.state.client
        before, after, limit = (number_of(request, name) for name in ("before", "after", "limit"))
        rows, more = self._page(client, before, after or 0, limit or _PAGE, request.query_params.get("id"))
        logs = [log for log in self._running.values() if _is_kept(log) and _is_visible(log.key, client)]
        running = [_running_row(log) for log in logs[:MOST_RUNNING]]
        encode = msgspec.json.encode
        return (
            b'{"object":"list","columns":%b,"data":[%b],"more":%b,"last":%d,"running":{"columns":%b,"count":%d,"data":%b}}'
            % (
                encode(COLUMNS),
                b",".join(rows),
                b"true" if more else b"false",
                self._number,
                encode(RUNNING_COLUMNS),
                len(logs),
                encode(running),
            )
        )

    def _page(
        self, client: ApiClient, before: int | None, after: int, limit: int, wanted: str | None
    ) -> tuple[list[bytes], bool]:
        rows: list[bytes] = []
        size = 0
        for row in reversed(self._ended):
            if row[0] <= after:
                break
            if (before is not None and row[0] >= before) or not _is_visible(row[_KEY], client):
                continue
            if wanted is not None and row[_ID] != wanted:
                continue
            encoded = msgspec.json.encode([round(one, 6) if isinstance(one, float) else one for one in row])
            size += len(encoded) + 1
            if len(rows) == limit or size > PAGE_BYTES:
                return rows, True
            rows.append(encoded)
        return rows, False


def _is_kept(log: RequestLog) -> bool:
    return log.is_usage


def _is_visible(key: str, client: ApiClient) -> bool:
    return client.is_admin or key == client.name


def _running_row(log: RequestLog) -> list[object]:
    seconds = round(time.perf_counter() - log.began, 3)
    return [
        log.id, log.key, log.model, log.pool, log.path[:_PATH], log.stream, log.is_held, log.first_byte_s, seconds,
        log.bytes_out,
    ]  # fmt: skip
