"""What the gateway answers itself, without waking anything: the models and their states, counters, documentation."""

from __future__ import annotations

import asyncio
import html
import json
import re
from collections.abc import Iterator

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.gateway.metrics import Metrics
from service.gateway.pool import Pool, State
from service.gateway.router import ModelRouter
from service.in_engine.vllm_service import http_contract
from service.in_engine.vllm_service.http_contract import HEALTHY, JSON
from service.registry.models import DEFAULT_ALIAS

_PAGE = """<!doctype html><meta charset="utf-8"><title>Models</title>
<style>body{{font:16px system-ui;max-width:60rem;margin:3rem auto;padding:0 1rem}}
td{{padding:.2rem 1rem .2rem 0}}
code{{background:#8881;padding:.1rem .3rem}}pre{{background:#8881;padding:1rem;overflow:auto}}</style>
<h1>An OpenAI-compatible API</h1>
<p>Send <code>Authorization: Bearer &lt;key&gt;</code>. The body's <code>model</code> is one of the names below, with
<code>-&lt;gpu&gt;</code> behind it for another GPU; <code>llm</code> means <code>{default}</code>.</p>
<pre>curl $URL/v1/chat/completions -H "Authorization: Bearer $API_KEY" -H 'Content-Type: application/json' \\
  -d '{{"model": "llm", "messages": [{{"role": "user", "content": "Hello!"}}]}}'</pre>
<h2>Routes</h2><table>{routes}</table>
<h2>Models</h2><p>{models}</p>
"""


class Catalog:
    """The handlers of these routes.

    Args:
        router: The models.
        metrics: What `/metrics` shows.
    """

    def __init__(self, router: ModelRouter, metrics: Metrics) -> None:
        self._router, self._metrics = router, metrics

    def routes(self) -> list[Route]:
        """Return the routes as Starlette has them."""
        return [
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/metrics", self._counters),
            Route("/docs", self._docs),
            Route("/openapi.json", self._openapi),
        ]

    async def _health(self, _: Request) -> Response:
        return Response(HEALTHY, media_type=JSON)

    async def _models(self, _: Request) -> Response:
        return Response(await list_models(self._router), media_type=JSON)

    async def _counters(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _docs(self, _: Request) -> Response:
        return Response(docs(self._router), media_type="text/html")

    async def _openapi(self, _: Request) -> Response:
        return Response(openapi(), media_type=JSON)


async def list_models(router: ModelRouter) -> bytes:
    """Return the answer of `GET /v1/models`: a list in OpenAI's shape, with further fields an entry.

    `state` is `cold`, `waking`, `ready` or `not_deployed`; `dollars_per_hour` is one replica's, null on this machine.
    """
    pools = router.default_pools()
    states = await asyncio.gather(*(pool.probe() for pool in pools))
    entries = [_entry(DEFAULT_ALIAS, pools[0], states[0])]
    for pool, state in zip(pools, states, strict=True):
        key = pool.spec.key
        entries.append(_entry(key, pool, state))
        entries += [_entry(part.name, pool, state) | {"parent": key} for part in pool.spec.adapters]
    return json.dumps({"object": "list", "data": entries}).encode()


def _entry(name: str, pool: Pool, state: State) -> dict[str, object]:
    spec = pool.spec
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": (spec.hub_id or "vllm-service").partition("/")[0],
        "root": spec.hub_id or spec.key,
        "parent": None,
        "max_model_len": spec.max_model_len,
        "gpu": pool.location,
        "dollars_per_hour": pool.dollars_per_hour,
        "state": state,
    }


def docs(router: ModelRouter) -> bytes:
    """Return a page for people."""
    routes = "".join(
        f"<tr><td><code>{route.method} {route.path}</code><td>{html.escape(route.summary)}" for route in _routes()
    )
    names = ", ".join(f"<code>{html.escape(key)}</code>" for key in router.registry.specs)
    default = html.escape(router.find(None).pool.spec.key)
    return _PAGE.format(default=default, routes=routes, models=names).encode()


def openapi() -> bytes:
    """Return the routes as an OpenAPI document; the bodies are OpenAI's and Anthropic's own."""
    paths: dict[str, dict[str, object]] = {}
    for route in _routes():
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return json.dumps(
        {
            "openapi": "3.1.0",
            "info": {"title": "vllm-service", "version": "1"},
            "security": [{"key": []}],
            "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
            "paths": paths,
        }
    ).encode()


def _operation(route: http_contract.ApiRoute) -> dict[str, object]:
    json_body = {"content": {JSON: {"schema": {"type": "object"}}}}
    operation: dict[str, object] = {"summary": route.summary, "responses": {"200": {"description": "OK"}}}
    if route.model_from == "body":
        operation["responses"] = {"200": {"description": "The engine's answer", **json_body}}
        operation["requestBody"] = {"required": True, **json_body}
    if names := re.findall(r"{(\w+)}", route.path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    return operation if route.needs_key else operation | {"security": []}


def _routes() -> Iterator[http_contract.ApiRoute]:
    for methods in http_contract.ROUTES.values():
        yield from methods.values()
