"""The parts of which the schemas of the gateway's own routes are written."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter

from service.in_engine.vllm_service.http_contract import JSON

Schema = dict[str, Any]

# A line of a docstring's `Attributes:`, with the lines that continue it.
_ATTRIBUTE = re.compile(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", re.M)
TEXT: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}


def said(schema: Schema, description: str) -> Schema:
    """Return a schema with a description."""
    return {**schema, "description": description}


def or_null(schema: Schema, description: str = "") -> Schema:
    """Return the schema of what may be null."""
    found = {**schema, "type": [schema["type"], "null"]} if "type" in schema else {"anyOf": [schema, {"type": "null"}]}
    return said(found, description) if description else found


def one_of(*values: str) -> Schema:
    """Return the schema of one of these texts."""
    return {"type": "string", "enum": [*values]}


def object_of(optional: Iterable[str] = (), /, **properties: Schema) -> Schema:
    """Return the schema of an object with these fields and no other; all are required but the optional ones."""
    required = [name for name in properties if name not in set(optional)]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def array(items: Schema, **more: Any) -> Schema:
    """Return the schema of an array."""
    return {"type": "array", "items": items, **more}


def ref(name: str) -> Schema:
    """Return a reference to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def properties_of(kind: type) -> dict[str, Schema]:
    """Return field -> schema of a model or dataclass; the descriptions are those of its docstring."""
    found = TypeAdapter(kind).json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
    said = dict(_ATTRIBUTE.findall(inspect.getdoc(kind) or ""))
    properties: dict[str, Schema] = found["properties"]
    for name, schema in properties.items():
        schema.pop("title", None)  # the name once more
        if name in said:
            schema["description"] = " ".join(said[name].split())
    return properties


def query(**parameters: Schema) -> list[Schema]:
    """Return the parameters of a query."""
    return [{"name": name, "in": "query", "schema": schema} for name, schema in parameters.items()]


def answer(schema: Schema, status: int = 200, media_type: str = JSON) -> Schema:
    """Return an operation's part about its answer."""
    return {"responses": {str(status): {"description": "The answer", "content": {media_type: {"schema": schema}}}}}


def body(schema: Schema, **examples: Schema) -> Schema:
    """Return an operation's part about its body."""
    content: Schema = {"schema": schema}
    if examples:
        content["examples"] = {name: {"value": value} for name, value in examples.items()}
    return {"requestBody": {"required": True, "content": {JSON: content}}}


PAGE_LIMIT = said({**INTEGER, "minimum": 0}, "How many rows an answer has at most")
