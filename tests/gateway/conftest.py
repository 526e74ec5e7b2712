"""One service with keys, and one LiteLLM proxy in front of it, for all tests of clients."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.engine import environment
from tests.engine.running import GONE_S, Service

from .clients import DEFAULT_KEY, KEY, OTHER_KEY, LiteLLM, models_file

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Time the tests here without their fixtures: the first one may have to build environments."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(300, func_only=True))


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The tiny model behind keys, as `vllm-service up` serves it."""
    environment.ensure()
    directory = tmp_path_factory.mktemp("served")
    keys = {"API_KEYS": f"clients={KEY},other={OTHER_KEY}", "API_KEY": DEFAULT_KEY}
    with Service(directory, "tiny", SERVICE_MODELS_FILE=str(models_file(directory)), **keys) as service:
        service.wait_ready()
        assert service.engine(), service.story
        yield service
        asked = service.signal()
        assert service.wait_ended(GONE_S) == 0, service.story
        service.wait_gone(asked + GONE_S)


@pytest.fixture(scope="session")
def elsewhere() -> Iterator[socket.socket]:
    """Where everything that leaves the machine over HTTPS is sent: it takes connections and answers none."""
    with socket.create_server(("127.0.0.1", 0)) as sink:
        sink.setblocking(False)
        yield sink


@pytest.fixture(scope="session")
def litellm(served: Service, elsewhere: socket.socket, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiteLLM]:
    """LiteLLM's proxy in front of the service, with what `vllm-service litellm` writes."""
    sink = f"http://127.0.0.1:{elsewhere.getsockname()[1]}"
    models = Path(served.environment["SERVICE_MODELS_FILE"])
    with LiteLLM(tmp_path_factory.mktemp("litellm"), served.url, models, HTTPS_PROXY=sink) as proxy:
        yield proxy
