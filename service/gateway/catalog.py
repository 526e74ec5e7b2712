"""What the door tells about itself without waking anything: models and their states, and a page of documentation."""

from __future__ import annotations

import asyncio
import html
import json

from service.gateway.pool import Pool, State
from service.gateway.router import Directory
from service.gateway.routes import INFERENCE, OPEN
from service.registry.models import DEFAULT_ALIAS

_OTHERS = {
    "/v1/models": "The models, with GPU, context, price and state; wakes nothing",
    "/metrics": "Counters for Prometheus; with ?model=<name> those of its engine; wakes nothing",
    "/health": "Whether the door is open; needs no key, wakes nothing",
    "/docs": "This page; needs no key",
    "/openapi.json": "The routes, for programs; needs no key",
}
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


async def models(directory: Directory) -> bytes:
    """Return the answer of `GET /v1/models`: a list in OpenAI's shape, with further fields an entry.

    `state` is `cold`, `waking`, `ready` or `not_deployed`; `dollars_per_hour` is one replica's, null on this machine.
    """
    pools = directory.own()
    states = await asyncio.gather(*(pool.observe() for pool in pools))
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
        "gpu": pool.place,
        "dollars_per_hour": pool.dollars_per_hour,
        "state": state,
    }


def docs(directory: Directory) -> bytes:
    """Return a page for people."""
    routes = "".join(
        f"<tr><td><code>{'GET' if path in _OTHERS else 'POST'} {path}</code><td>{html.escape(what)}"
        for path, what in (INFERENCE | _OTHERS).items()
    )
    names = ", ".join(f"<code>{html.escape(key)}</code>" for key in directory.registry.specs)
    default = html.escape(directory.find(None).pool.spec.key)
    return _PAGE.format(default=default, routes=routes, models=names).encode()


def openapi() -> bytes:
    """Return the routes as an OpenAPI document; the bodies are OpenAI's and Anthropic's own."""
    json_body = {"content": {"application/json": {"schema": {"type": "object"}}}}
    paths: dict[str, object] = {}
    for path, what in INFERENCE.items():
        answer = {"200": {"description": "The engine's answer", **json_body}}
        paths[path] = {"post": {"summary": what, "requestBody": {"required": True, **json_body}, "responses": answer}}
    for path, what in _OTHERS.items():
        operation: dict[str, object] = {"summary": what, "responses": {"200": {"description": "OK"}}}
        paths[path] = {"get": operation | ({"security": []} if path in OPEN else {})}
    return json.dumps(
        {
            "openapi": "3.1.0",
            "info": {"title": "vllm-service", "version": "1"},
            "security": [{"key": []}],
            "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
            "paths": paths,
        }
    ).encode()
