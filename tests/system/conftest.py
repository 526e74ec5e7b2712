"""The services with the tiny model that several files share: one without keys, one with keys and a price; a browser."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from service.engine import environment
from tests.engine.dialogues import TINY
from tests.engine.running import GONE_S, Service

from .browser import chromium

ADMIN_KEY, KEY = "sk-admin-5f0c1", "sk-plain-77ab2"
SCRAPER_KEY, LIMITED_KEY = "sk-scraper-0c4e2", "sk-limited-91d3a"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
KEYS = {"root": ADMIN_KEY, "plain": KEY, "prometheus": SCRAPER_KEY, "limited": LIMITED_KEY}
LIMITS = {
    "root": {"admin": True},
    "prometheus": {"admin": True},
    "limited": {"requests_per_minute": 2, "tokens_per_day": 100_000},
}
MODELS = f"""
[models.tiny]
path = "{TINY}"
price = {{ input = 1.0, output = 2.0 }}
"""


@pytest.fixture(scope="session")
def engine_environment() -> None:
    """The engine's environment, which is built when this machine has none."""
    environment.ensure()


@pytest.fixture(scope="session")
def served(engine_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The tiny model as `vllm-service up` serves it, without keys."""
    with Service(tmp_path_factory.mktemp("served"), "tiny") as service:
        service.wait_ready()
        yield service
        service.engine()
        asked = service.signal()
        assert service.wait_ended(GONE_S) == 0, service.story
        service.wait_gone(asked + GONE_S)


@pytest.fixture(scope="session")
def keyed(engine_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The tiny model with a price, behind two admin keys and two others, of which one has limits."""
    directory = tmp_path_factory.mktemp("keyed")
    (directory / "models.toml").write_text(MODELS)
    environment = {
        "API_KEYS": ",".join(f"{name}={key}" for name, key in KEYS.items()),
        "API_LIMITS": json.dumps(LIMITS),
        "SERVICE_MODELS_FILE": str(directory / "models.toml"),
    }
    with Service(directory, "tiny", **environment) as running:
        yield running.wait_ready()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests of a file."""
    expect.set_options(timeout=30_000)  # the machine may be busy
    with chromium() as running:
        yield running
