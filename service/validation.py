"""Explains all errors that pydantic found in data: a sentence each, with field, value and what was expected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from service.errors import did_you_mean


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return a sentence for everything that is wrong: the field, its value, what was expected.

    Args:
        error: What pydantic raised.
        model: What it was to validate.
    """
    return [_sentence(detail, model) for detail in error.errors()]


def _sentence(detail: Any, model: type[BaseModel]) -> str:
    *path, name = detail["loc"] or ("",)
    field = ".".join(map(str, detail["loc"]))
    if detail["type"] == "value_error":  # one of our own validators raised it
        return str(detail["ctx"]["error"])
    if detail["type"] == "extra_forbidden":
        known = _model_at(model, path).model_fields
        return f"unknown field '{field}'.{did_you_mean(str(name), known)} Known: {', '.join(known)}."
    if detail["type"] == "missing":
        return f"field '{field}' is missing."
    return f"field '{field}' is {detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}."


def _model_at(model: type[BaseModel], path: list[str | int]) -> type[BaseModel]:
    """Return the model of the table at this path: indexes of lists are passed over."""
    for part in path:
        if field := model.model_fields.get(str(part)):
            model = next(_models(field.annotation), model)
    return model


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
