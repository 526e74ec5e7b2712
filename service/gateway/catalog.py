"""What the gateway answers itself, without waking anything: the models and their states, usage, requests, counters."""

from __future__ import annotations

import asyncio
import json

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.gateway.api_client import ApiClient
from service.gateway.metrics import Metrics
from service.gateway.pool import Pool, State
from service.gateway.router import ModelRouter
from service.gateway.threads import in_thread
from service.gateway.usage_report import UsageReport
from service.in_engine.vllm_service.http_contract import HEALTHY, JSON
from service.registry.models import DEFAULT_ALIAS


class Catalog:
    """The handlers of these routes.

    Args:
        router: The models.
        metrics: What `/metrics` shows.
        usage: What `/v1/usage` shows.
    """

    def __init__(self, router: ModelRouter, metrics: Metrics, usage: UsageReport) -> None:
        self._router, self._metrics, self._usage_report = router, metrics, usage
        self._describing = asyncio.Lock()  # threads that work at the same time would take the event loop's time

    def routes(self) -> list[Route]:
        """Return the routes as Starlette has them."""
        return [
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._model),
            Route("/v1/usage", self._usage),
            Route("/v1/requests", self._requests),
            Route("/v1/key", self._key),
            Route("/metrics", self._counters),
        ]

    async def _health(self, _: Request) -> Response:
        return Response(HEALTHY, media_type=JSON)

    async def _models(self, request: Request) -> Response:
        entries = await model_entries(self._router, request.state.client, self._describing)
        ends = {"first_id": entries[0]["id"], "last_id": entries[-1]["id"]} if entries else {}
        body = {"object": "list", "data": entries, "has_more": False, **ends}  # the last three are Anthropic's
        return Response(json.dumps(body).encode(), media_type=JSON)

    async def _model(self, request: Request) -> Response:
        name, client = request.path_params["model"], request.state.client
        route = self._router.find(name)
        key = route.pool.spec.key
        client.check_model(key, name)
        state = await route.pool.probe()
        async with self._describing:
            fields = await in_thread(lambda: describe(route.pool, state))
        parent = None if route.name == key else key  # of an adapter
        return Response(json.dumps({"id": name.strip(), **fields, "parent": parent}).encode(), media_type=JSON)

    async def _counters(self, _: Request) -> Response:
        return Response(await self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _usage(self, request: Request) -> Response:
        """Return what the client has used; to an admin what all have, and what replicas cost beside."""
        return Response(await self._usage_report.answer(request), media_type=JSON)

    async def _requests(self, request: Request) -> Response:
        return Response(self._metrics.recent.answer(request), media_type=JSON, headers={"cache-control": "no-store"})

    async def _key(self, request: Request) -> Response:
        client: ApiClient = request.state.client
        limits = client.limits.model_dump(exclude_defaults=True, exclude={"admin"})
        fields = {
            "name": client.name,
            "admin": client.is_admin,
            "anonymous": client.is_anonymous,
            "limits": limits,
        }
        return Response(json.dumps(fields).encode(), media_type=JSON, headers={"cache-control": "no-store"})


async def model_entries(router: ModelRouter, client: ApiClient, describing: asyncio.Lock) -> list[dict[str, object]]:
    """Return what `GET /v1/models` lists for a client: the models that it may use, `llm` first if that is one of them.

    An entry has OpenAI's shape with further fields. `state` is `cold`, `waking`, `ready`, `failed` (its last wake
    did), `not_deployed` or `does_not_fit`, and `reason` says why; `waking_s` is how
    long it wakes, `usual_s` how long that takes; `dollars_per_hour` is one replica's now, null on
    this machine.
    """
    default = router.find(None).pool
    pools = [pool for pool in router.default_pools() if client.may_use(pool.spec.key)]
    states = await asyncio.gather(*(pool.probe() for pool in pools))
    # in a thread: a machine is asked for its memory, and the cache for files of models
    async with describing:
        described = await in_thread(lambda: [describe(pool, state) for pool, state in zip(pools, states, strict=True)])
    entries: list[dict[str, object]] = []
    for pool, fields in zip(pools, described, strict=True):
        key = pool.spec.key
        names = [DEFAULT_ALIAS, key] if pool is default else [key]
        entries += [{"id": name, **fields} for name in names]
        entries += [{"id": part.name, **fields, "parent": key} for part in pool.spec.adapters]
    return entries


def describe(pool: Pool, state: State) -> dict[str, object]:
    """Return the fields that a model's names share. Blocks for a moment."""
    spec, why, failure = pool.spec, pool.why_unfit(pool.spec.key), pool.failure
    return {
        "object": "model",
        "type": "model",  # this and the next three are Anthropic's
        "display_name": spec.key,
        "created_at": "1970-01-01T00:00:00Z",
        "lifecycle": "active",
        "created": 0,
        "owned_by": (spec.hub_id or "vllm-service").partition("/")[0],
        "root": spec.hub_id or spec.key,
        "parent": None,
        "max_model_len": pool.max_model_len,
        "gpu": pool.location,
        "dollars_per_hour": pool.current_price and round(pool.current_price, 4),
        "state": "does_not_fit" if why else "failed" if state == "cold" and failure else state,
        "reason": why.message if why else failure,
        "waking_s": round(pool.waking_s, 3),
        "usual_s": pool.usual_s and round(pool.usual_s, 3),
    }
