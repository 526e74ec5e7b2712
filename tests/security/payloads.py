"""Bodies for every route of the engine's own OpenAPI document: extremes of each field, random values of its schema."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_service import http_contract

Schema = Mapping[str, Any]
Body = dict[str, Any]

HI = [{"role": "user", "content": "Hi"}]
# What a body has beside the field that is tried; that of a route that is not here comes from the schema.
BASES: dict[str, Body] = {
    "/v1/chat/completions": {"messages": HI, "max_tokens": 1},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 1},
    "/v1/messages": {"messages": HI, "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": HI},
    "/v1/embeddings": {"input": "Hi"},
    "/v1/rerank": {"query": "Hi", "documents": ["a", "b"]},
    "/v1/score": {"queries": "Hi", "documents": ["a", "b"]},
    "/classify": {"input": "Hi"},
    "/v1/audio/transcriptions": {"language": "en", "max_completion_tokens": 1},
    "/v1/audio/translations": {"language": "en", "max_completion_tokens": 1},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1, 2]},
}
_DEPTH = 4  # of random values
_NEST: Any = None
for _ in range(200):
    _NEST = [_NEST] if _ % 2 else {"a": _NEST}
EXTREMES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, -1e308, float("nan"), float("inf")),
    *(2**31 - 1, 2**31, -(2**31) - 1, 2**32, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 2**70, -(2**70), 10**400),
    *("", " ", "x", "0", "auto", "none", "\0", "\ud800", "\x1b[31m", "\u202e", "../../etc/passwd", "{{ 7 * 7 }}"),
    *("x" * 100_000, "<|im_end|>", "file:///etc/passwd", "http://127.0.0.1:1/", "data:image/png;base64,AAAA", "%s%n"),
    *([], [None], [[]], [{}], [0], [-1], [""], [2**70], [HI], ["x"] * 2000, [0] * 10_000),
    *({}, {"": None}, {"type": None}, {"type": "x"}, {"$ref": "#"}, {"a": {"b": {}}}, {"\ud800": 1}, {"__class__": 1}),
    {f"k{number}": number for number in range(1000)},
    _NEST,
)


def paths(document: Schema) -> dict[str, Schema]:
    """Return the schemas of the bodies that a service reads, by path; the guard hides further ones."""
    found = {}
    for path, methods in document["paths"].items():
        body = methods.get("post", {}).get("requestBody")
        if body and "POST" in http_contract.routes_at(path):
            found[path] = next(iter(body["content"].values()))["schema"]
    return found


class Payloads:
    """The bodies for one route.

    Args:
        document: The engine's OpenAPI document.
        path: The route.
        model: The `model` of every body.
    """

    def __init__(self, document: Schema, path: str, model: str) -> None:
        self._schemas: Schema = document["components"]["schemas"]
        self.path = path
        self._body = paths(document)[path]
        self.base: Body = {"model": model, **(BASES.get(path) or self._required())}
        self.fields = {name: inner for one in self._choices(self._body) for name, inner in _fields(one).items()}

    def extremes(self) -> Iterator[Body]:
        """Yield a body for each field and each extreme, and for each value that its schema names."""
        for name, schema in self.fields.items():
            for value in (*EXTREMES, *self._named(schema)):
                yield {**self.base, name: value}

    def draw(self, rng: random.Random) -> Body:
        """Return a body with a few random fields, most of them of their schemas."""
        names = rng.sample([*self.fields], min(rng.choice((1, 1, 2, 3, 8)), len(self.fields)))
        return self.base | {name: self.value(self.fields[name], rng) for name in names}

    def value(self, schema: Schema, rng: random.Random, depth: int = _DEPTH) -> Any:
        """Return a random value, which mostly fits a schema."""
        if rng.random() < 0.1:
            return rng.choice(EXTREMES)
        one = rng.choice(self._choices(schema))
        if named := [*one.get("enum", ()), *((one["const"],) if "const" in one else ())]:
            return rng.choice(named)
        match one.get("type"):
            case "object":
                return self._object(one, rng, depth)
            case "array":
                many = rng.choice((0, 1, 1, 2, 5)) if depth else 0
                return [self.value(one.get("items", {}), rng, depth - 1) for _ in range(many)]
        return _scalar(one, rng)

    def _object(self, schema: Schema, rng: random.Random, depth: int) -> Body:
        fields, required = _fields(schema), schema.get("required", ())
        if not depth:
            return {}
        chosen = [name for name in fields if name in required or rng.random() < 0.3]
        return {name: self.value(fields[name], rng, depth - 1) for name in chosen}

    def _required(self) -> Body:
        one, rng = self._choices(self._body)[0], random.Random(0)  # noqa: S311 - no secret
        return {name: self.value(_fields(one)[name], rng) for name in one.get("required", ()) if name != "model"}

    def _named(self, schema: Schema) -> Iterator[Any]:
        for one in self._choices(schema):
            yield from one.get("enum", ())
            yield from (one[name] + step for name in ("minimum", "maximum") if name in one for step in (-1, 0, 1))

    def _choices(self, schema: Schema) -> list[Schema]:
        """Return what a value may be, references followed."""
        if "$ref" in schema:
            return self._choices(self._schemas[schema["$ref"].rpartition("/")[2]])
        found = [
            choice
            for kind in ("anyOf", "oneOf", "allOf")
            for one in schema.get(kind, ())
            for choice in self._choices(one)
        ]
        return found or [schema]


def _fields(schema: Schema) -> Mapping[str, Schema]:
    fields: Mapping[str, Schema] = schema.get("properties", {})
    return fields


def _scalar(schema: Schema, rng: random.Random) -> Any:
    match schema.get("type"):
        case "integer" | "number":
            low, high = schema.get("minimum", -2), schema.get("maximum", 8)
            return rng.choice((low, high, low - 1, high + 1, rng.uniform(low, high), rng.randint(0, 5)))
        case "string":
            return rng.choice(("Hi", "user", "text", "function", "auto", "a", "[a-z]+", "{}"))
        case "boolean":
            return rng.random() < 0.5
    return rng.choice(EXTREMES)
