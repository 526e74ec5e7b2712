"""One service for all tests that only talk to it; tests that end one start their own."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import openai
import pytest

from service.engine import environment as engine_environment

from .guarded import KEYS, Guarded, guarded
from .running import FOREIGN, GONE_S, Service


@pytest.fixture(scope="session")
def engine_env_() -> engine_environment.EngineEnv:
    """The engine's environment, which is built when this machine has none."""
    return engine_environment.ensure()


@pytest.fixture(scope="session")
def engine_python(engine_env_: engine_environment.EngineEnv) -> str:
    """Interpreter of the engine's environment."""
    return engine_env_.python


@pytest.fixture(scope="session")
def tiny(engine_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The tiny model, served without keys, where no C++ is compiled; Ctrl-C ends it, and then nothing of it is left."""
    with Service(tmp_path_factory.mktemp("tiny"), "tiny", CXX="/nowhere/c++", **FOREIGN) as service:
        service.wait_said("Starting the engine").probe_port()
        yield service.wait_ready()
        assert service.engine(), service.story
        asked = service.signal(signal.SIGINT)
        assert service.wait_ended(GONE_S) == 0, service.story
        service.wait_gone(asked + GONE_S)
        assert time.monotonic() - asked < GONE_S


# It lives in this process, whose log has its output: it ends with the tests of this package.
@pytest.fixture(scope="package")
def generating(engine_env_: engine_environment.EngineEnv) -> Iterator[Guarded]:
    """A generating engine behind its guard, with keys and no gateway in front."""
    with guarded(engine_env_, KEYS) as engine:
        yield engine


@pytest.fixture(scope="session")
def client(tiny: Service) -> Iterator[openai.OpenAI]:
    """The official client, told nothing but where the service is."""
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def start(engine_python: str, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start a service of the test's own; whatever is left of it is killed after the test."""
    with ExitStack() as stack:

        def begin(*arguments: str, port: int | None = None, name: str = "service", **environment: str) -> Service:
            return stack.enter_context(Service(tmp_path, *arguments, port=port, name=name, **environment))

        yield begin
