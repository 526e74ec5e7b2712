"""Follows the log of an app, or of the pool of one model, through Modal's API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from modal._logs import LogsFilters, tail_logs
from modal._utils.async_utils import synchronizer
from modal.client import _Client
from modal_proto import api_pb2 as pb

from service import interrupts
from service.modal_app import account

_POLL_S = 55.0  # how long Modal holds one request for further lines


@dataclass(frozen=True)
class Line:
    """A line of a container's output; `replica` is the container's id."""

    at: datetime
    replica: str
    text: str


def lines(app: account.App, model: str | None, newest: int, *, follow: bool) -> Iterator[Line]:
    """Yield the newest lines of an app's log, and then further ones as they come.

    Args:
        app: Whose.
        model: Only those of its pool; None: of all containers.
        newest: How many of those that are there.
        follow: Go on until interrupted, or until the app is stopped.

    Raises:
        ServiceError: Modal refused.
    """
    with account.translate_errors(f"read the log of app '{app.name}'"):
        filters = _of_pool(app, model) if model else LogsFilters()
        for task_id, at, text in _entries(app.id, filters, newest, follow):
            interrupts.check()
            when = datetime.fromtimestamp(at, UTC)
            yield from (Line(when, task_id, part) for part in text.splitlines() if part.strip())


def _of_pool(app: account.App, model: str) -> LogsFilters:
    """Return the filter that `modal function logs` sends for one variant of a class: its own id, and the class's."""
    pool = account.pool(app.name, model).hydrate().object_id
    return LogsFilters(function_id=account.class_function_id(app), parametrized_function_id=pool)


@synchronizer.create_blocking
async def _entries(
    app_id: str, filters: LogsFilters, newest: int, follow: bool
) -> AsyncIterator[tuple[str, float, str]]:
    client, seen = await _Client.from_env(), 0.0
    if newest:
        async for batch in tail_logs(client, app_id, newest, filters=filters):
            for item in batch.items:
                seen = max(seen, _time(item))
                yield batch.task_id, _time(item), item.data
    last, done = "", not follow
    while not done:
        request = pb.AppGetLogsRequest(
            app_id=app_id,
            timeout=_POLL_S,
            last_entry_id=last,
            function_id=filters.function_id,
            parametrized_function_id=filters.parametrized_function_id,
        )
        async for batch in client._stub.AppGetLogs.unary_stream(request):
            last, done = batch.entry_id or last, batch.app_done
            for item in batch.items:
                if item.data and _time(item) > seen:  # what was read above may come again
                    yield batch.task_id, _time(item), item.data
            if done:
                break


def _time(item: Any) -> float:
    return item.timestamp_ns / 1e9 if item.timestamp_ns else float(item.timestamp)
