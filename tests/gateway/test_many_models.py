"""Many models on one machine, with the real engine: started by requests, replaced when they die, ended when idle."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests

from service.engine import environment
from tests.engine.dialogues import COUNTING, QUESTION
from tests.engine.running import Service, check_stops, requests_running, wait_until

TINY = Path(__file__).parents[2] / "service/assets/tiny"
IDLE_S = 8


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The tiny model served, and a second entry of it that no request has named yet."""
    environment.ensure()
    directory = tmp_path_factory.mktemp("many")
    models = directory / "models.toml"
    models.write_text(f'[models.second]\npath = "{TINY}"\nweights_gb = 0.004\nmax_model_len = 2048\n')
    settings = {"SERVICE_MODELS_FILE": str(models), "SERVICE_SCALEDOWN_WINDOW": str(IDLE_S), "API_KEYS": "me=my-key"}
    with Service(directory, "tiny", **settings) as service:
        yield service.wait_ready()
        left = engines(service)
        service.signal(signal.SIGINT)
        assert service.wait_ended(15) == 0, service.story
        assert not any(engine.is_running() for engine in left), service.story


def engines(service: Service) -> list[psutil.Process]:
    """Return the leaders of the service's engines, oldest first."""
    children = psutil.Process(service.pid).children()
    leaders = [child for child in children if "vllm_service.main" in child.cmdline()]
    return sorted(leaders, key=lambda process: process.create_time())


def post(service: Service, body: object, **options: object) -> requests.Response:
    """POST a chat with the key."""
    return requests.post(
        f"{service.url}/v1/chat/completions",
        json=body,
        headers={"Authorization": "Bearer my-key"},
        timeout=120,
        **options,  # type: ignore[arg-type]
    )


def state(service: Service, model: str) -> str:
    """Return what `/v1/models` says of a model; that wakes nothing."""
    listed = requests.get(f"{service.url}/v1/models", headers={"Authorization": "Bearer my-key"}, timeout=30).json()
    return str(next(entry["state"] for entry in listed["data"] if entry["id"] == model))


def test_hundred_clients_of_a_cold_model_start_one_engine_and_are_all_answered(service: Service) -> None:
    """A stream gets comments meanwhile."""
    before = engines(service)
    assert state(service, "second") == "cold"
    with post(service, {"model": "second", "stream": True, **QUESTION}, stream=True) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith(b": waking second on this machine, ")
        assert state(service, "second") == "waking"
        with ThreadPoolExecutor(100) as pool:
            answers = list(pool.map(lambda _: post(service, {"model": "second", **QUESTION}), range(100)))
        assert b"data: [DONE]" in list(lines)
    assert {answer.status_code for answer in answers} == {200}
    assert all("Paris" in answer.json()["choices"][0]["message"]["content"] for answer in answers)
    assert len([engine for engine in engines(service) if engine not in before]) == 1


def test_client_that_leaves_stops_the_real_generation(service: Service) -> None:
    """Within a second the engine has no request."""
    with post(service, {"model": "second", **COUNTING}, stream=True) as stream:
        assert stream.status_code == 200, stream.text + service.err
        lines = stream.iter_lines()  # whose end is the connection's
        next(line for line in lines if line.startswith(b"data: "))  # on a slow machine the model was stopped as idle
        wait_until(lambda: running(service) > 0, 10, service)
    check_stops(lambda: running(service))


def running(service: Service) -> int:
    """Return how many requests the second model's engine has."""
    headers = {"Authorization": "Bearer my-key"}
    answer = requests.get(f"{service.url}/metrics?model=second", headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text + service.err
    return round(requests_running(answer.text))


def test_engine_killed_under_streams_ends_each_with_an_error_and_is_replaced(service: Service) -> None:
    """Every stream ends with an error event; a new engine answers the next request."""
    post(service, {"model": "second", **QUESTION})
    victim = engines(service)[-1]
    said: list[list[bytes]] = []
    began = threading.Barrier(11)

    def stream() -> None:
        with post(service, {"model": "second", **COUNTING, "n": 1}, stream=True) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            began.wait(60)
            said.append([first, *lines])

    threads = [threading.Thread(target=stream) for _ in range(10)]
    for thread in threads:
        thread.start()
    began.wait(60)
    victim.kill()
    for thread in threads:
        thread.join(30)
    assert len(said) == 10
    for lines in said:
        errors = [json.loads(line[6:]) for line in lines if line.startswith(b'data: {"error"')]
        assert len(errors) == 1, lines[-30:]
    answer = post(service, {"model": "second", **QUESTION})
    assert answer.status_code == 200, answer.text + service.err
    assert "The engine of second died; the next request starts another." in service.err


def test_engine_without_requests_is_ended_and_its_model_is_cold_again(service: Service) -> None:
    """Requests for its state do not keep it awake; the next chat wakes it, and the service's first model likewise."""
    post(service, {"model": "second", **QUESTION})
    wait_until(lambda: state(service, "second") == "cold", IDLE_S + 20, service)
    wait_until(lambda: state(service, "tiny") == "cold", IDLE_S + 20, service)
    assert post(service, {"model": "llm", **QUESTION}).status_code == 200
    assert not service.ended
