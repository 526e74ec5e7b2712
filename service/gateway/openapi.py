"""The OpenAPI document of the gateway: every route of `http_contract`, the engine's with vLLM's own schemas.

`make openapi` writes those schemas (`engine.json`) anew for another version of vLLM; the schemas of the gateway's own
routes are in `own_schemas` and `batch_schemas`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service import __version__
from service.gateway import batch_schemas, own_schemas
from service.gateway.fallback import ASKED
from service.gateway.proxy import COST_HEADER
from service.gateway.request_examples import EXAMPLES
from service.in_engine.vllm_service.api_error import ERROR_NAMES, APIError, unauthorized
from service.in_engine.vllm_service.http_contract import (
    EVENT_STREAM,
    FORM,
    JSON,
    ROUTES,
    ApiRoute,
    Protocol,
    protocol_of,
)

DIRECTORY = Path(__file__).parents[1] / "api_docs"
_ENGINE = DIRECTORY / "engine.json"
_KEYS: list[dict[str, list[str]]] = [{"bearer": []}, {"x-api-key": []}]
_ABOUT = (
    "The API of OpenAI, Anthropic's Messages, and routes of this service's own. The body's `model` is any name that "
    "`GET /v1/models` lists, with `-<gpu>` behind it for another GPU; `llm`, or none, is the default model."
)
_TAGS = {
    "OpenAI": "Answered by the engine of the body's model; a cold one wakes first",
    "Anthropic": "The same engines in Anthropic's shapes",
    "Service": "Answered by the gateway itself: wakes nothing",
    "Operators": "For admin keys",
    "Open": "For browsers and monitors, without a key",
}
_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "As OpenAI's clients send the key"},
    "x-api-key": {
        "type": "apiKey",
        "in": "header",
        "name": "x-api-key",
        "description": "As Anthropic's clients send it; one of the two is enough",
    },
}
_HEADERS = {
    ASKED: ({"type": "string", "enum": ["allow", "deny"]}, "Whether another model may answer while this one is cold"),
    COST_HEADER.decode().title(): ({"type": "string", "enum": ["1"]}, "A stream ends with a comment that has its cost"),
}


def document(*, needs_key: bool = True) -> bytes:
    """Return the document as JSON. Takes some 50 ms.

    Args:
        needs_key: Whether the service has keys.
    """
    engine = json.loads(_ENGINE.read_bytes())
    own = own_operations()
    paths: dict[str, dict[str, Any]] = {}
    for route in _routes():
        described = own.get((route.method, route.path)) or _of_engine(route, engine["paths"])
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, described)
    found = {
        "openapi": "3.1.0",
        "info": {"title": "vllm-service", "version": __version__, "description": _ABOUT},
        "servers": [{"url": "."}],
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "security": _KEYS if needs_key else [],
        "paths": paths,
        "components": {
            "securitySchemes": _SCHEMES if needs_key else {},
            "responses": dict(_error_responses()),
            "schemas": {**_ERRORS, **own_schemas.schemas(), **batch_schemas.schemas(), **engine["schemas"]},
        },
    }
    return json.dumps(found, separators=(",", ":")).encode()


def own_operations() -> dict[tuple[str, str], dict[str, Any]]:
    """Return (method, path) -> what is said of the routes that the gateway answers itself."""
    return own_schemas.operations() | batch_schemas.operations()


def _routes() -> Iterator[ApiRoute]:
    for methods in ROUTES.values():
        yield from methods.values()


def _of_engine(route: ApiRoute, known: dict[str, Any]) -> dict[str, Any]:
    """Return what the engine's schemas say of a route; of one that they do not have, that bodies are JSON."""
    found = known.get(route.path, {}).get(route.method.lower(), {})
    content = {JSON: {"schema": found.get("answer", {"type": "object"})}}
    if event := found.get("event"):
        content[EVENT_STREAM] = {"schema": event}
    described: dict[str, Any] = {"responses": {"200": {"description": "The engine's answer", "content": content}}}
    if route.model_from == "body":
        (found_body,) = found.get("requestBody", {}).get("content", {}).values() or [{"schema": {"type": "object"}}]
        body: dict[str, Any] = {"schema": found_body["schema"]}
        if examples := EXAMPLES.get(route.path):
            body["examples"] = {name: {"value": value} for name, value in examples.items()}
        # FastAPI says of a form with a file that it is urlencoded, which none can be
        described["requestBody"] = {"required": True, "content": {FORM if route.is_form else JSON: body}}
    parameters = [*found.get("parameters", ())]
    if route.model_from == "query":
        parameters += own_schemas.MODEL_QUERY
    if route.streams:
        parameters += [
            {"name": name, "in": "header", "description": text, "schema": schema}
            for name, (schema, text) in _HEADERS.items()
        ]
    return {**described, "parameters": parameters}


def _operation(route: ApiRoute, described: dict[str, Any]) -> dict[str, Any]:
    parameters = [*described.get("parameters", ())]
    known = {parameter["name"] for parameter in parameters}
    parameters += [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", route.path)
        if name not in known
    ]
    shape = _shape(route.path)
    return {
        "tags": [_tag(route)],
        "summary": route.summary.replace("`", ""),
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{route.path}").strip("_"),
        **described,
        **({"parameters": parameters} if parameters else {}),
        "responses": {
            **described["responses"],
            **{status: {"$ref": f"#/components/responses/{shape}{status}"} for status in ("4XX", "5XX")},
        },
        **({} if route.needs_key else {"security": []}),
    }


def _tag(route: ApiRoute) -> str:
    if not route.needs_key:
        return "Open"
    if route.admin:
        return "Operators"
    return "Service" if route.gateway_only or not route.model_from else _shape(route.path)


def _shape(path: str) -> str:
    return "Anthropic" if protocol_of(path) is Protocol.ANTHROPIC else "OpenAI"


_TEXT = {"type": "string"}
_ERRORS = {
    "OpenAIErrorAnswer": {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "message": {"type": "string", "description": "What happened, and what to do"},
                    "type": {"type": "string", "enum": sorted({names.openai for names in ERROR_NAMES.values()})},
                    "param": {"type": ["string", "null"], "description": "The field that is at fault"},
                    "code": {"type": "string", "description": "A word that programs can test"},
                },
                "required": ["message", "type", "param", "code"],
            }
        },
        "required": ["error"],
    },
    "AnthropicErrorAnswer": {
        "type": "object",
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "properties": {
                    "type": {"type": "string", "enum": sorted({names.anthropic for names in ERROR_NAMES.values()})},
                    "message": {"type": "string", "description": "What happened, and what to do"},
                },
                "required": ["type", "message"],
            },
            "request_id": _TEXT,
        },
        "required": ["type", "error", "request_id"],
    },
}


def _error_responses() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and response of the errors of each protocol, by the first digit of their statuses."""
    waking = APIError(503, "'tiny' is waking. Send the request again in 20 s.", code="model_waking", retry_after_s=20)
    kinds = ((4, "The request is at fault", unauthorized()), (5, "The service is at fault", waking))
    for shape, path in (("OpenAI", ""), ("Anthropic", "/v1/messages")):
        for digit, what, example in kinds:
            named = {status: names for status, names in ERROR_NAMES.items() if status // 100 == digit}
            types = "; ".join(
                f"{status} {names.anthropic if shape == 'Anthropic' else names.code}" for status, names in named.items()
            )
            content = {
                "schema": {"$ref": f"#/components/schemas/{shape}ErrorAnswer"},
                "example": json.loads(example.body(path, "6c1f0e9a")),
            }
            yield f"{shape}{digit}XX", {"description": f"{what}: {types}", "content": {JSON: content}}
