"""The routes of operators: keys and their limits, adapters, and reload. Only keys that are admin get here."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.errors import ServiceError, UnknownModelError, UsageError
from service.gateway.live_config import LiveConfig
from service.gateway.pages import number_of
from service.gateway.request_body import read_object
from service.gateway.threads import in_thread
from service.gateway.uploads import Uploads
from service.in_engine.vllm_service.api_error import APIError
from service.in_engine.vllm_service.http_contract import JSON
from service.registry.entries import Adapter
from service.usage.key_records import KeyRecord
from service.usage.keys import GRACE_S, Keys, validated
from service.usage.limits import KeyLimits
from service.validation import explain
from service.weights.files import is_upload

_log = logging.getLogger(__name__)
_NO_KEYS = "This needs an admin key, and the service has no keys. Make one: vllm-service keys new admin --admin."
_ADAPTER = {"model", "name", "hub_id", "revision"}
_ADAPTER_BODY = (
    "The body has the texts 'model', 'name' (the adapter's, for requests), 'hub_id' (owner/repository) and 'revision' "
    "(its commit, 40 hexadecimal digits), and nothing else."
)
_NO_STORE = "Keys of this service are in its environment only"


class Admin:
    """The handlers of these routes.

    Args:
        config: What they change; None: this gateway has no such routes.
    """

    def __init__(self, config: LiveConfig | None) -> None:
        self._config = config
        self._uploads = Uploads()

    def routes(self) -> list[Route]:
        """Return the routes as Starlette has them."""
        return [
            Route("/admin/keys", self._list, methods=["GET"]),
            Route("/admin/keys", self._new, methods=["POST"]),
            Route("/admin/keys/rotate", self._rotate, methods=["POST"]),
            Route("/admin/keys/revoke", self._revoke, methods=["POST"]),
            Route("/admin/keys/limit", self._limit, methods=["POST"]),
            Route("/admin/reload", self._reload, methods=["POST"]),
            Route("/admin/adapters", self._adapter, methods=["POST"]),
        ]

    async def _list(self, request: Request) -> Response:
        config = self._checked(request)
        limit, after = number_of(request, "limit"), request.query_params.get("after")
        source, now = config.source, time.time()
        limits = {name: source.limits.get(name, KeyLimits()) for name in {*source.digests.values()}}
        found = [
            {"name": name, "state": "environment", "keys": [], "limits": one.model_dump(exclude_defaults=True)}
            for name, one in sorted(limits.items())
        ]
        found = [] if after else found  # they come first, on one page
        if source.store is None:
            return _json({"keys": found, "more": False})
        keys = Keys(source.store)
        if limit is None:
            records, more = await self._run(keys.records), False
        else:
            records = await self._run(lambda: keys.page(after or "", limit + 1))  # one more tells of further ones
            records, more = records[:limit], len(records) > limit
        return _json({"keys": [*found, *(record.to_fields(now) for record in records)], "more": more})

    async def _new(self, request: Request) -> Response:
        keys, name, rest = await self._request(request)
        self._check_models(rest)
        record, key = await self._run(lambda: keys.new(name, rest))
        return await self._changed(record, key=key)

    async def _rotate(self, request: Request) -> Response:
        keys, name, rest = await self._request(request)
        grace_s = rest.pop("grace_s", GRACE_S)
        if rest or isinstance(grace_s, bool) or not isinstance(grace_s, int | float):
            raise APIError(400, "The body has 'name', and as 'grace_s' how many seconds the old key stays valid.")
        record, key = await self._run(lambda: keys.rotate(name, grace_s))
        return await self._changed(record, key=key)

    async def _revoke(self, request: Request) -> Response:
        keys, name, rest = await self._request(request)
        if rest:
            raise APIError(400, "The body has 'name', and nothing else.")
        return await self._changed(await self._run(lambda: keys.revoke(name)))

    async def _limit(self, request: Request) -> Response:
        keys, name, rest = await self._request(request)
        self._check_models(rest)
        return await self._changed(await self._run(lambda: keys.limit(name, rest)))

    async def _reload(self, request: Request) -> Response:
        config = self._checked(request)
        try:
            return _json(await config.reload())
        except ServiceError as error:
            raise APIError(400, f"Nothing was changed: {error}", code="reload_refused") from error

    async def _adapter(self, request: Request) -> Response:
        config = self._checked(request)
        fields = await read_object(request, self._uploads)
        if fields is None or fields.keys() != _ADAPTER or not all(isinstance(one, str) for one in fields.values()):
            raise APIError(400, _ADAPTER_BODY)
        model = fields.pop("model")
        try:
            adapter = Adapter.model_validate(fields)
        except ValidationError as error:
            raise APIError(400, f"{' '.join(explain(error, Adapter))} {_ADAPTER_BODY}") from error
        if is_upload(fields["hub_id"]):
            raise APIError(400, f"hub_id is {fields['hub_id']!r}, an upload. {_ADAPTER_BODY}", param="hub_id")
        try:
            key = await config.add_adapter(model, adapter)
        except UnknownModelError as error:
            raise APIError(404, str(error), code="model_not_found", param="model") from error
        except ServiceError as error:
            status, retry = (503, 5) if error.is_transient else (400, None)
            raise APIError(
                status, f"Nothing was changed: {error}", code="adapter_refused", retry_after_s=retry
            ) from error
        _log.info("Key '%s' added adapter '%s' to model '%s'.", request.state.client.name, adapter.name, key)
        return _json({"model": key, **fields})

    def _checked(self, request: Request) -> LiveConfig:
        """Return what may be changed.

        Raises:
            APIError: 403: the service has no keys, so everybody who can connect would be its operator.
        """
        if request.state.client.is_anonymous or self._config is None:
            raise APIError(403, _NO_KEYS)
        return self._config

    async def _request(self, request: Request) -> tuple[Keys, str, dict[str, Any]]:
        """Return what changes keys, and name and further fields of the body."""
        source = self._checked(request).source
        if source.store is None:
            raise APIError(400, f"{_NO_STORE}: API_KEYS and API_LIMITS.", code="no_key_store")
        fields = await read_object(request, self._uploads)
        if fields is None or not isinstance(name := fields.pop("name", None), str):
            raise APIError(400, "The body must be a JSON object with the 'name' of a key.", param="name")
        return Keys(source.store, lambda: {*source.digests.values()}), name, fields

    def _check_models(self, limits: dict[str, Any]) -> None:
        assert self._config is not None  # noqa: S101 - `_request` has looked
        try:
            self._config.source.check_models(validated(limits), self._config.router.registry)
        except UsageError as error:
            raise APIError(400, str(error)) from error

    async def _run(self, work: Callable[[], Any]) -> Any:
        try:
            return await in_thread(work)
        except UsageError as error:
            raise APIError(400, str(error)) from error
        except ServiceError as error:
            raise APIError(503, str(error), retry_after_s=1) from error

    async def _changed(self, record: KeyRecord, **more: str) -> Response:
        """Return the answer to a change, which holds from now on."""
        assert self._config is not None  # noqa: S101 - `_request` has looked
        await self._config.refresh_keys()
        return _json({**record.to_fields(time.time()), **more})


def _json(body: dict[str, Any]) -> Response:
    return Response(json.dumps(body).encode(), media_type=JSON, headers={"cache-control": "no-store"})
