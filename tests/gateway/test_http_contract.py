"""The HTTP contract: gateway and guard serve what `http_contract` lists, and both take routes and errors from it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import vllm_service.http_contract as guards_contract
from starlette.responses import JSONResponse
from starlette.routing import Router
from vllm_service.drain import Drain
from vllm_service.guard import Guard

import service.in_engine.vllm_service.http_contract as gateways_contract
from service.gateway import openapi
from service.gateway.clients import ClientRegistry
from tests.engine.routes import KNOWN
from tests.gateway.upstream import serve_gateway, serving

KEYS = {hashlib.sha256(b"a-key").hexdigest(): "alice"}
ALICE = {"Authorization": "Bearer a-key"}
BODY = {"model": "tiny", "documents": ["a", "b"]}
NEW = "/v2/brand-new"


@asynccontextmanager
async def guarded() -> AsyncIterator[str]:
    """Serve a guard in front of an application that answers with the path and the model of each request."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await Router()(scope, receive, send)
            return
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        body += message["body"]
        await JSONResponse({"path": scope["path"], "model": json.loads(body)["model"]})(scope, receive, send)

    async with serving(Guard(application, [], Drain())) as url:
        yield url


@pytest.mark.parametrize("path", [NEW, "/v2/{thing}/brand-new"])
def test_contract_route_added_there_is_served_through_gateway_and_guard(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is listed both answer 404; with the entry the request reaches the engine, and /openapi.json has it."""
    asked = path.format(thing="x-1")

    async def run() -> None:
        async with guarded() as url, serve_gateway(ClientRegistry(KEYS), url=url) as gateway:
            async with gateway.post(BODY, asked, headers=ALICE) as answer:
                assert answer.status == 404
            async with gateway.http.post(url + asked, json=BODY) as answer:
                assert answer.status == 404
            for module in (gateways_contract, guards_contract):  # one file, imported under two names
                route = module.ApiRoute("POST", path, "New", model_from="body", body_limit=1024)
                monkeypatch.setitem(module.ROUTES, path, {"POST": route})
            async with gateway.post(BODY, asked, headers=ALICE) as answer:
                assert (answer.status, await answer.json()) == (200, {"path": asked, "model": "tiny"})
            async with gateway.post(BODY, asked) as answer:
                assert answer.status == 401
            async with gateway.post(BODY | {"user": "x" * 1024}, asked, headers=ALICE) as answer:
                assert answer.status == 413
            async with gateway.http.post(url + asked, json=BODY | {"user": "x" * 1024}) as answer:
                assert answer.status == 413
            async with gateway.http.get(gateway.url + asked, headers=ALICE) as answer:
                assert (answer.status, answer.headers["Allow"]) == (405, "POST")
            assert json.loads(openapi.document())["paths"][path]["post"]["summary"] == "New"

    asyncio.run(run())


def test_contract_lists_none_of_the_routes_that_vllm_leaves_open() -> None:
    """Routes that vLLM has beside the API, and its administration, stay closed."""
    assert [path for path in KNOWN if guards_contract.routes_at(path)] == []


def test_contract_template_is_not_a_path() -> None:
    """A request for the template itself, braces included, finds no route."""
    assert guards_contract.routes_at("/v1/responses/{response_id}") == {}


@pytest.mark.parametrize("path", ["/v1/responses/é", "/v1/responses/a\n", "/v1/responses/", "/v1/responses/a/b"])
def test_contract_segment_is_ascii_letters_digits_dash_and_underscore(path: str) -> None:
    """What a response's id cannot be is no route."""
    assert guards_contract.routes_at(path) == {}
