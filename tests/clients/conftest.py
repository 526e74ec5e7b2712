"""One service with keys, and one LiteLLM proxy in front of it, for all tests of clients."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.engine import environment
from tests.engine.running import Service, serving

from .clients import FRAMEWORKS, LiteLLM, agents_file, api_keys, models_file, sink
from .programs import AGENTS, LOADS


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The tiny model behind keys, as `vllm-service up` serves it; each framework has a key of its own."""
    environment.ensure()
    directory = tmp_path_factory.mktemp("served")
    settings = {
        "SERVICE_MODELS_FILE": str(models_file(directory)),
        "API_KEYS": api_keys(FRAMEWORKS),
        "API_LIMITS": '{"clients": {"admin": true}}',  # the tests read /metrics
    }
    with serving(directory, "tiny", **settings) as service:
        yield service


@pytest.fixture(scope="session")
def agents_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The agents' model as the default one, and SmolLM2; each program has a key of its own."""
    environment.ensure()
    directory = tmp_path_factory.mktemp("agents")
    keys = api_keys(program.name for program in [*AGENTS, *LOADS])
    with serving(directory, "agents", SERVICE_MODELS_FILE=str(agents_file(directory)), API_KEYS=keys) as service:
        yield service


@pytest.fixture(scope="session")
def elsewhere() -> Iterator[socket.socket]:
    """Where LiteLLM's requests to other machines are sent."""
    with sink() as server:
        yield server


@pytest.fixture(scope="session")
def litellm(served: Service, elsewhere: socket.socket, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiteLLM]:
    """LiteLLM's proxy in front of the service, with what `vllm-service litellm` writes."""
    sink = f"http://127.0.0.1:{elsewhere.getsockname()[1]}"
    models = Path(served.environment["SERVICE_MODELS_FILE"])
    with LiteLLM(tmp_path_factory.mktemp("litellm"), served.url, models, HTTPS_PROXY=sink) as proxy:
        yield proxy
