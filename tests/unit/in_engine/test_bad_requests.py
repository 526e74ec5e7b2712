"""Which value of a request the engine cannot take; tests/engine sends such requests to a real one."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pytest
from vllm_service.bad_requests import (
    _field_at_fault,
    _outside_64_bits,
    _shortened,
    drop_query,
    shorten_clients_error,
)

HUGE = 2**70


@dataclass
class Constraint:
    """As vLLM keeps a schema."""

    json: Any = None


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"top_k": HUGE}, "top_k"),
        ({"seed": -HUGE}, "seed"),
        ({"stop_token_ids": [1, HUGE]}, "stop_token_ids[1]"),
        ({"structured_outputs": Constraint({"enum": [HUGE]})}, "structured_outputs.json.enum[0]"),
        ({"chat_template_kwargs": {"a": {"b": HUGE}}}, "chat_template_kwargs.a.b"),
        ({"top_k": 2**64 - 1, "seed": -(2**63), "temperature": 1e300, "stop": str(HUGE), "echo": True}, None),
    ],
)
def test_integer_outside_64_bits_is_found_with_its_path(fields: dict[str, Any], path: str | None) -> None:
    """Wherever it stands: the message to the engine core holds no such integer."""
    assert next(_outside_64_bits(fields), None) == path


def test_integer_in_a_deep_schema_is_found() -> None:
    """Deeper than Python recurses."""
    schema: Any = HUGE
    for _ in range(5000):
        schema = {"not": schema}

    assert next(_outside_64_bits({"schema": schema}), "").endswith("not.not")


def validate(body: Any) -> None:
    """Break at a list in `outputs`, after the prompt was looked at."""
    if not body.get("prompt"):
        raise ValueError("a prompt is needed")
    if "outputs" in body:
        body["outputs"].get("json")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "a", "outputs": []}, "outputs"),
        ({"outputs": [], "prompt": "a", "n": 1}, "outputs"),
        ({"prompt": "a", "outputs": {}}, None),
        ([1], None),
    ],
)
def test_field_that_breaks_a_validator_is_found(body: Any, field: str | None) -> None:
    """It is the one without which the body passes, not one that is needed."""
    assert _field_at_fault(validate, body) == field


def test_body_is_shortened_before_its_fields_are_tried() -> None:
    """Ten thousand messages would be validated once for each field."""
    body = {"messages": [{"content": "x" * 10_000}] * 10_000, "tools": {str(n): n for n in range(1000)}, "n": 1}

    short = _shortened(body)
    assert short["messages"] == [{"content": "x" * 100}]
    assert (len(short["tools"]), short["n"]) == (100, 1)


@pytest.mark.parametrize(("error", "is_kept"), [(ValueError("x"), False), (RuntimeError("x"), True)])
def test_log_has_tracebacks_of_the_engines_own_errors_only(error: Exception, is_kept: bool) -> None:
    """A client with a key could fill the log, 6 KB a request, and choose what it says."""
    arguments = ("vllm", logging.ERROR, __file__, 1, "Error: %s", ("a" * 1000,), (type(error), error, None))
    record = logging.LogRecord(*arguments)

    assert shorten_clients_error(record)
    assert bool(record.exc_info) == is_kept
    assert (len(record.getMessage()) > 1000) == is_kept


def test_log_has_no_query() -> None:
    """A client that sends its key there is refused, and the key is not kept."""
    arguments = ("1.2.3.4:5", "GET", "/v1/models?api_key=x", "1.1", 401)
    record = logging.LogRecord("uvicorn.access", logging.INFO, __file__, 1, '%s - "%s %s HTTP/%s" %d', arguments, None)

    assert drop_query(record)
    assert record.getMessage() == '1.2.3.4:5 - "GET /v1/models HTTP/1.1" 401'
