"""The routes of operators about pools: what they do now, their last boots, wake and stop. Reading wakes nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Collection, Mapping
from contextlib import closing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.gateway.catalog import describe
from service.gateway.http_client.connections import Connections
from service.gateway.pool import Pool, State
from service.gateway.request_body import read_object
from service.gateway.router import ModelRouter
from service.gateway.router import Route as ModelRoute
from service.gateway.threads import in_thread
from service.gateway.uploads import Uploads
from service.in_engine.vllm_service.api_error import APIError
from service.in_engine.vllm_service.http_contract import JSON

_BOOTS = 20
_PROBE_INTERVAL_S = 20.0  # a probe of a deployed pool is a call of Modal's, and a console may be open all day
_ENGINE_INTERVAL_S, _ENGINE_TIMEOUT_S = 1.0, 2.0
_METRICS_BYTES = 4 * 1024 * 1024  # of an engine's /metrics that are read; vLLM's are some 100 KB
_REFUSED_AT_ONCE_S = 0.05
_CLOSE_S = 10.0  # a gateway that ends waits no longer for its pools
# Source: vLLM 0.32, v1/metrics/loggers.py
_ENGINE_METRIC = re.compile(
    rb"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc|num_preemptions_total|"
    rb"prompt_tokens_total|generation_tokens_total)(?:\{[^\n]*\})? (\S+)$",
    re.M,
)
_log = logging.getLogger(__name__)


class PoolStatus:
    """The handlers of these routes.

    Args:
        router: Has the pools.
    """

    def __init__(self, router: ModelRouter) -> None:
        self._router = router
        self._uploads = Uploads()
        self._turn = asyncio.Lock()  # consoles that are open at the same time share what was read
        self._probed: dict[Pool, tuple[float, State]] = {}
        self._engines: dict[Pool, tuple[float, dict[str, float] | None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def routes(self) -> list[Route]:
        """Return the routes as Starlette has them."""
        return [
            Route("/admin/pools", self._pools, methods=["GET"]),
            Route("/admin/pools/wake", self._wake, methods=["POST"]),
            Route("/admin/pools/stop", self._stop, methods=["POST"]),
            Route("/admin/boots", self._boots, methods=["GET"]),
        ]

    async def _pools(self, request: Request) -> Response:
        client = request.state.client
        names = self._router.known_pools()
        pools = [pool for pool in names if client.may_use(pool.spec.key)]
        async with self._turn:
            self._forget(names)
            states = await self._states(pools)
            engines = await asyncio.gather(*(self._engine(pool, request.state.http) for pool in pools))
            described = await in_thread(
                lambda: [describe(pool, state) for pool, state in zip(pools, states, strict=True)]
            )
        rows = [
            {"name": names[pool], **_fields(fields), **_now(pool), "engine": engine}
            for pool, fields, engine in zip(pools, described, engines, strict=True)
        ]
        return _json({"object": "list", "data": rows})

    async def states(self, pools: Collection[Pool]) -> list[State]:
        """Return the states of pools; Modal is asked no more often than an open console has it asked."""
        async with self._turn:
            return await self._states(pools)

    async def _states(self, pools: Collection[Pool]) -> list[State]:
        return await asyncio.gather(*map(self._state, pools))

    async def _state(self, pool: Pool) -> State:
        known, now = pool.state, time.monotonic()
        if known != "cold":
            self._probed.pop(pool, None)
            return known
        at, state = self._probed.get(pool, (-_PROBE_INTERVAL_S, known))
        if now - at >= _PROBE_INTERVAL_S:
            state = await pool.probe()
            self._probed[pool] = now, state
        return state

    async def _engine(self, pool: Pool, http: Connections) -> dict[str, float] | None:
        """Return what the pool's engine says of itself; None: it is not asked.

        One behind Modal is asked only while it answers a request: any request would keep its container alive.
        """
        endpoint = pool.endpoint()
        if endpoint is None or endpoint.forwards_client_key or not pool.may_be_read:
            self._engines.pop(pool, None)
            return None
        at, found = self._engines.get(pool, (-_ENGINE_INTERVAL_S, None))
        if time.monotonic() - at < _ENGINE_INTERVAL_S:
            return found
        try:
            async with asyncio.timeout(_ENGINE_TIMEOUT_S):
                with closing(await http.get(endpoint.with_path("/metrics"), endpoint.headers)) as answer:
                    found = engine_figures(await answer.read_all(_METRICS_BYTES)) if answer.status == 200 else None
        except (OSError, TimeoutError) as error:
            _log.debug("The engine of '%s' did not answer: %s", pool.spec.key, error)
            found = None
        self._engines[pool] = time.monotonic(), found
        return found

    def _forget(self, pools: Collection[Pool]) -> None:
        """Drop what was kept of pools that are gone: a reload replaces them."""
        for kept in (self._probed, self._engines):
            for pool in kept.keys() - set(pools):
                del kept[pool]

    async def _wake(self, request: Request) -> Response:
        route = await self._requested(request)
        route.pool.check(route.name)
        route.pool.forget_failure()
        await self._begin(route.pool.ready(), f"wake {route.pool.spec.key}")
        return _json({"model": route.pool.spec.key, "state": route.pool.state}, 202)

    async def _stop(self, request: Request) -> Response:
        pool = (await self._requested(request)).pool
        if pool.state == "waking":
            raise APIError(409, f"'{pool.spec.key}' is waking; stop it once it is ready.", code="pool_is_waking")
        await self._begin(self._stopped(pool), f"stop {pool.spec.key}")
        return _json({"model": pool.spec.key, "state": pool.state}, 202)

    async def _stopped(self, pool: Pool) -> None:
        try:
            await pool.stop()
        finally:
            self._probed.pop(pool, None)  # an open console asked meanwhile

    async def close(self) -> None:
        """End the stops that run: each gives its autoscaler the settings back, which only this process knows."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_S)

    async def _begin(self, work: Any, name: str) -> None:
        """Start it, and raise what refuses it at once."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)

        def done(_: object) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()):
                _log.warning("%s: %s", name, error)

        task.add_done_callback(done)
        await asyncio.wait({task}, timeout=_REFUSED_AT_ONCE_S)
        if task.done():
            task.result()

    async def _requested(self, request: Request) -> ModelRoute:
        fields = await read_object(request, self._uploads)
        if fields is None or fields.keys() != {"model"} or not isinstance(name := fields["model"], str):
            raise APIError(400, "The body must be a JSON object with the 'model', and nothing else.", param="model")
        route = self._router.find(name)
        request.state.client.check_model(route.pool.spec.key, name)
        return route

    async def _boots(self, request: Request) -> Response:
        name = request.query_params.get("model")
        route = self._router.find(name)
        request.state.client.check_model(route.pool.spec.key, name or route.name)
        records = (await route.pool.boots())[-_BOOTS:]
        return _json({"object": "list", "data": [record.as_object() for record in reversed(records)]})


def engine_figures(text: bytes) -> dict[str, float]:
    """Return the figures of an engine's `/metrics`, summed over its cores; of the KV cache's use the highest."""
    found: dict[str, float] = {}
    for name, value in _ENGINE_METRIC.findall(text):
        key, number = name.decode().removesuffix("_total"), float(value)
        found[key] = max(found.get(key, 0.0), number) if key == "kv_cache_usage_perc" else found.get(key, 0.0) + number
    return found


def _fields(described: Mapping[str, object]) -> dict[str, object]:
    names = ("root", "max_model_len", "gpu", "dollars_per_hour", "state", "reason", "waking_s", "usual_s")
    return {"id": described["display_name"], **{name: described[name] for name in names}}


def _now(pool: Pool) -> dict[str, object]:
    return {
        "is_full": pool.is_full,
        "in_use": pool.in_use,
        "answering": pool.answering,
        "idle_s": round(time.monotonic() - pool.used_at, 1),
        "phases": [[span.name, span.start, span.end] for span in pool.wake_phases],
    }


def _json(body: dict[str, Any], status: int = 200) -> Response:
    text = json.dumps(body, separators=(",", ":")).encode()
    return Response(text, status, media_type=JSON, headers={"cache-control": "no-store"})
