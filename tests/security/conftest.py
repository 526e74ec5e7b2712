"""The two targets, which all attacks share: they end with the tests of this package, and must not end before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from .targets import Target, gateway, guard


@pytest.fixture(scope="package")
def attacked_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """The gateway in front of an engine."""
    with gateway(tmp_path_factory.mktemp("gateway")) as target:
        yield target


@pytest.fixture(scope="package")
def attacked_guard() -> Iterator[Target]:
    """An engine behind its guard alone."""
    with guard() as target:
        yield target


@pytest.fixture(params=["gateway", "guard"])
def attacked(request: pytest.FixtureRequest) -> Target:
    """Each of the two."""
    target: Target = request.getfixturevalue(f"attacked_{request.param}")
    return target


@pytest.fixture(scope="package")
def document(attacked_guard: Target) -> dict[str, Any]:
    """The engine's OpenAPI document."""
    found: dict[str, Any] = json.loads(attacked_guard.ask("GET", "/openapi.json").body)
    return found
