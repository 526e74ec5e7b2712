"""The routes of `/v1/batches`: create, retrieve, list, cancel. A client sees its own batches only."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.batch import deadline
from service.batch.files_api import found_file, page, seconds_kept, store_of
from service.batch.lines import URLS
from service.batch.room import storing
from service.batch.store import KEPT_S, MOST_BATCHES, Batch, ClientStore, Store
from service.boots.records import new_id
from service.gateway.request_body import read_object
from service.gateway.threads import in_thread
from service.gateway.uploads import Uploads
from service.in_engine.vllm_service.api_error import APIError
from service.in_engine.vllm_service.http_contract import JSON

_WINDOW = re.compile(r"([1-9]\d{0,4})([smh])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600}
_LONGEST_S = 24 * 3600
_METADATA, _METADATA_KEY, _METADATA_VALUE = 16, 64, 512  # OpenAI's: pairs, and characters of both


class BatchesApi:
    """The handlers of these routes.

    Args:
        store: The batches.
        begin: Has a batch driven that was created.
        wake: Has one ended that was cancelled.
    """

    def __init__(
        self, store: Store, begin: Callable[[ClientStore, Batch], Awaitable[None]], wake: Callable[[], None]
    ) -> None:
        self._store, self._begin, self._wake, self._uploads = store, begin, wake, Uploads()

    def routes(self) -> list[Route]:
        """Return the routes as Starlette has them."""
        return [
            Route("/v1/batches", self._create, methods=["POST"]),
            Route("/v1/batches", self._list, methods=["GET"]),
            Route("/v1/batches/{batch_id}", self._batch, methods=["GET"]),
            Route("/v1/batches/{batch_id}/cancel", self._cancel, methods=["POST"]),
        ]

    async def _create(self, request: Request) -> Response:
        store = store_of(self._store, request)
        fields = await read_object(request, self._uploads)
        if fields is None:
            raise APIError(400, "The body is no JSON object. Send input_file_id and endpoint.", code="invalid_json")
        with storing():
            batch = await in_thread(lambda: self._new(store, fields))
        await self._begin(store, batch)  # raises nothing: the batch is there
        return _json(batch.to_fields())

    def _new(self, store: ClientStore, fields: dict[str, Any]) -> Batch:
        if len(store.batches()) >= MOST_BATCHES:
            message = f"The key '{store.owner}' has {MOST_BATCHES} batches of the last 30 days, which is the limit."
            raise APIError(413, message, code="quota_exceeded")
        if not isinstance(name := fields.get("input_file_id"), str):
            raise _invalid("input_file_id", name, "the id of a file")
        if (url := fields.get("endpoint")) not in URLS:
            raise _invalid("endpoint", url, f"one of {', '.join(URLS)}")
        file = found_file(store, name)
        window, window_s = _window(fields.get("completion_window"))
        kept = fields.get("output_expires_after") or {"anchor": "created_at", "seconds": KEPT_S}
        if not isinstance(kept, dict):
            raise _invalid("output_expires_after", kept, "an object with anchor and seconds")
        now, number = int(time.time()), new_id()
        batch = Batch(
            id=f"batch_{number}",
            endpoint=url,
            input_file_id=file.id,
            completion_window=window,
            created_at=now,
            expires_at=now + window_s,
            output_id=f"file-{new_id()}",
            error_id=f"file-{new_id()}",
            output_kept_s=seconds_kept(kept.get("anchor"), kept.get("seconds")),
            metadata=_metadata(fields.get("metadata")),
        )
        rate = deadline.last_rate(self._store, batch, store.content(file.id))
        batch.errors = deadline.warnings(batch, file.lines, rate, now)
        store.add_batch(batch)
        return batch

    async def _list(self, request: Request) -> Response:
        store = store_of(self._store, request)
        found = [batch.to_fields() for batch in await in_thread(store.batches)]
        return page(request, found, default=20, most=100)

    async def _batch(self, request: Request) -> Response:
        store = store_of(self._store, request)
        return _json((await in_thread(lambda: _found(store, request.path_params["batch_id"]))).to_fields())

    async def _cancel(self, request: Request) -> Response:
        store = store_of(self._store, request)

        def cancel() -> Batch:
            batch = _found(store, request.path_params["batch_id"])
            if batch.is_final or batch.status == "finalizing":
                message = f"Batch '{batch.id}' is {batch.status}, and can be cancelled no more."
                raise APIError(409, message, code="batch_not_running")
            store.ask_to_cancel(batch)
            return _found(store, batch.id)

        with storing():
            batch = await in_thread(cancel)
        self._wake()
        return _json(batch.to_fields())


def _found(store: ClientStore, name: str) -> Batch:
    if name.startswith("batch_") and (batch := store.batch(name)):
        return batch
    raise APIError(404, f"The key '{store.owner}' has no batch '{name[:100]}'. GET /v1/batches lists its batches.")


def _window(given: object) -> tuple[str, int]:
    found = _WINDOW.fullmatch(given) if isinstance(given, str) else None
    seconds = int(found[1]) * _UNIT_S[found[2]] if found else 0
    if found is None or seconds > _LONGEST_S:
        raise _invalid("completion_window", given, "a time of at most 24h, such as 24h, 90m or 45s")
    return found[0], seconds


def _metadata(given: object) -> dict[str, str] | None:
    if given is None:
        return None
    try:
        metadata = msgspec.convert(given, dict[str, str])
    except msgspec.ValidationError:
        raise _invalid("metadata", given, "an object of strings") from None
    is_short = all(len(key) <= _METADATA_KEY and len(value) <= _METADATA_VALUE for key, value in metadata.items())
    if len(metadata) > _METADATA or not is_short:
        most = f"at most {_METADATA} pairs of {_METADATA_KEY} and {_METADATA_VALUE} characters"
        raise _invalid("metadata", given, f"an object of {most}")
    return metadata


def _invalid(name: str, given: object, expected: str) -> APIError:
    text = json.dumps(given)
    shown = text if len(text) <= 80 else f"{text[:80]}…"
    return APIError(400, f"{name}={shown} is not {expected}.", code="invalid_value", param=name)


def _json(fields: object) -> Response:
    return Response(json.dumps(fields).encode(), media_type=JSON, headers={"cache-control": "no-store"})
