"""The check that tests/engine runs against real engines, against guards that were weakened: it notices each."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as StarletteRoute
from vllm_service import http_contract
from vllm_service.api_error import APIError
from vllm_service.guard import Guard
from vllm_service.http_contract import ROUTES, ApiRoute

from tests.engine.exposure import Answer, Case, cases, violations
from tests.engine.routes import ALLOWED, KNOWN

KEY = "open-sesame"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()
Weaken = Callable[[pytest.MonkeyPatch], None]


def vllm() -> Starlette:
    """Return an application with the routes of vLLM, each of which answers 200, and FastAPI's words for the rest."""

    async def answer(request: Request) -> Response:
        return JSONResponse({})

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"detail": error.detail}, error.status_code)

    routes = [StarletteRoute(path, answer, methods=sorted(methods)) for path, methods in ALLOWED.items()]
    routes += [StarletteRoute(path, answer, methods=["GET", "POST"]) for path in KNOWN]
    return Starlette(routes=routes, exception_handlers={HTTPException: refuse})


def found(digests: list[str]) -> list[str]:
    """Return what the check finds wrong with the guard as it is now."""
    guarded = Guard(vllm(), digests)
    return violations(lambda case: asyncio.run(_answer(guarded, case)), cases(KNOWN, KEY if digests else None))


async def _answer(app: Guard, case: Case) -> Answer:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    headers = [(name.lower().encode(), value.encode()) for name, value in case.headers.items()]
    scope = {"type": "http", "path": unquote(case.path), "method": case.method, "headers": headers, "query_string": b""}
    await app(scope, receive, send)
    body = b"" if case.method == "HEAD" else b"".join(message.get("body", b"") for message in sent)
    return Answer(sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}, body)


@pytest.mark.parametrize("digests", [[DIGEST], []], ids=["keys", "no keys"])
def test_exposure_of_the_guard_as_it_is_is_right(digests: list[str]) -> None:
    """The check finds nothing, with keys and without."""
    assert found(digests) == []


def _change(patch: pytest.MonkeyPatch, path: str, **changes: Any) -> None:
    for method, route in ROUTES[path].items():
        patch.setitem(ROUTES[path], method, replace(route, **changes))


def _everything(patch: pytest.MonkeyPatch) -> None:
    methods = ("GET", "POST", "PUT", "PATCH", "DELETE", "TRACE")
    patch.setattr(http_contract, "routes_at", lambda path: {method: ApiRoute(method, path, "") for method in methods})


def _one_route_more(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(ROUTES, "/invocations", {"POST": ApiRoute("POST", "/invocations", "")})


def _one_method_more(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(ROUTES["/v1/embeddings"], "GET", ApiRoute("GET", "/v1/embeddings", ""))


def _one_route_less(patch: pytest.MonkeyPatch) -> None:
    patch.delitem(ROUTES, "/v1/embeddings")


def _prefixes(patch: pytest.MonkeyPatch) -> None:
    keyed = [(known, routes) for known, routes in ROUTES.items() if not http_contract.is_open(routes)]
    patch.setattr(
        http_contract, "routes_at", lambda path: next((found for known, found in keyed if path.startswith(known)), {})
    )


def _no_keys(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Guard, "_admits", lambda *_: True)


def _any_key(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Guard, "_admits", lambda _, scope: b"authorization" in dict(scope["headers"]))


def _open_metrics(patch: pytest.MonkeyPatch) -> None:
    admits = Guard._admits
    patch.setattr(Guard, "_admits", lambda self, scope: scope["path"] == "/metrics" or admits(self, scope))


def _no_limits(patch: pytest.MonkeyPatch) -> None:
    for path in ROUTES:
        _change(patch, path, body_limit=1 << 62)


def _one_limit(patch: pytest.MonkeyPatch) -> None:
    for path in ROUTES:
        _change(patch, path, body_limit=http_contract.BODY_LIMIT)


def _other_errors(patch: pytest.MonkeyPatch) -> None:
    async def refuse(error: APIError, _path: str, _id: str, send: Any) -> None:
        await JSONResponse({"detail": error.message}, error.status)({"type": "http"}, None, send)  # type: ignore[arg-type]

    patch.setattr(APIError, "send", refuse)


def _options_to_vllm(patch: pytest.MonkeyPatch) -> None:
    before = Guard._http

    async def pass_options(self: Guard, scope: Any, receive: Any, send: Any) -> None:
        await (self.app if scope["method"] == "OPTIONS" else before.__get__(self))(scope, receive, send)

    patch.setattr(Guard, "_http", pass_options)


@pytest.mark.parametrize(
    ("weaken", "noticed"),
    [
        (_everything, "POST /invocations"),
        (_one_route_more, "POST /invocations"),
        (_one_method_more, "GET /v1/embeddings"),
        (_one_route_less, "POST /v1/embeddings"),
        (_prefixes, "POST /v1/chat/completions/render"),
        (_no_keys, "POST /v1/chat/completions"),
        (_any_key, "POST /v1/chat/completions"),
        (_open_metrics, "GET /metrics"),
        (_no_limits, "POST /v1/chat/completions"),
        (_one_limit, "POST /tokenize"),
        (_other_errors, "POST /invocations"),
        (_options_to_vllm, "OPTIONS /v1/models"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_exposure_of_a_weakened_guard_is_noticed(weaken: Weaken, noticed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any part of the guard out, the check names a request that shows it."""
    weaken(monkeypatch)
    assert any(line.startswith(f"{noticed} ") for line in found([DIGEST]))
