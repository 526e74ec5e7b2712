"""`GET /v1/usage`: what the client's key has used; to an admin what all keys have."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request

from service.errors import UsageError
from service.gateway.api_client import ApiClient
from service.gateway.pages import number_of
from service.gateway.threads import in_thread
from service.in_engine.vllm_service.api_error import APIError
from service.usage import report
from service.usage.database import Database, DatabaseError


class UsageReport:
    """Reads the database.

    Args:
        connect: Opens it.
    """

    def __init__(self, connect: Callable[[], Database]) -> None:
        self._connect = connect
        self._turn = asyncio.Lock()  # one connection to the database at a time

    async def answer(self, request: Request) -> bytes:
        """Return the JSON of the answer.

        Raises:
            APIError: 400: a field of the query is wrong. 503: the database cannot be read.
        """
        client: ApiClient = request.state.client
        query = request.query_params
        try:
            by = report.parse_by(query.get("by", "key"))
            since = report.parse_since(query["since"], datetime.now(UTC)) if query.get("since") else None
            limit, offset = number_of(request, "limit"), number_of(request, "offset") or 0
        except UsageError as error:
            raise APIError(400, str(error), code="invalid_value", param=str(error).partition("=")[0]) from None

        key = None if client.is_admin else client.name

        def read() -> dict[str, Any]:
            with contextlib.closing(self._connect()) as database:
                page = (
                    None if limit is None else report.Page(limit + 1, offset)
                )  # one more tells whether there are more
                rows = report.usage(database, by, since, key, page)
                more = limit is not None and len(rows) > limit
                total = report.usage_total(database, since, key)
                rows = rows[:limit] + (report.operator_rows(database, since) if client.is_admin and not more else [])
            return {"data": [row.as_object() for row in rows], "more": more, "total": total.as_object()}

        try:
            async with self._turn:
                found = await in_thread(read)
        except DatabaseError as error:
            message = "The ledger cannot be read at the moment. The gateway's log has the reason."
            raise APIError(503, message, code="ledger_unavailable", retry_after_s=5) from error
        return json.dumps({"object": "list", "by": by, **found}).encode()
