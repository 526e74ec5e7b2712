"""Extremes of every field of every protocol, as the engine's own OpenAPI document has them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_service import http_contract

from tests.engine.recordings import recording
from tests.gateway.forms import CONTENT_TYPE, form

from .barrage import Input, barrage
from .payloads import Payloads, paths
from .targets import KEY, Target, request

SEED = 13
SHARE = 0.25  # of the extremes of a field: one engine takes all of them in about a minute


def inputs(document: Mapping[str, Any], model: str, share: float = 1.0) -> Iterator[Input]:
    """Yield a request for each field and extreme of a document's routes, or for a random share of them."""
    rng = random.Random(SEED)  # noqa: S311 - no secret
    for path in paths(document):
        payloads = Payloads(document, path, model)
        for number, body in enumerate(payloads.extremes()):
            if rng.random() < share:
                yield Input(f"field {number}", path, _request(path, body))


def _request(path: str, body: Mapping[str, Any]) -> bytes:
    """Return a request whose body is JSON, or a form with a recording, by its route."""
    headers = {"Authorization": f"Bearer {KEY}"}
    if not http_contract.routes_at(path)["POST"].is_form:
        return request("POST", path, headers, json.dumps(body).encode())
    fields = {name: value if isinstance(value, str) else json.dumps(value) for name, value in body.items()}
    return request("POST", path, headers | {"Content-Type": CONTENT_TYPE}, form(fields, recording(0.2)))


def test_extremes_of_every_field_are_served_or_refused(attacked: Target, document: Mapping[str, Any]) -> None:
    """No 5xx that is not documented, no traceback, and the engine lives."""
    with attacked.unharmed():
        outcome = barrage(attacked, inputs(document, "tiny", SHARE))
    assert outcome.finds == []
    assert outcome.inputs > 1500
    assert set(outcome.statuses) >= {200, 400}
