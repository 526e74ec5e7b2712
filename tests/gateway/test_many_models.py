"""Many models on one machine, with the real engine: started by requests, replaced when they die, ended when idle."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests

from service.engine import environment
from tests.engine.dialogues import COUNTING, QUESTION, dialogue
from tests.engine.running import Service, check_stops, requests_running, wait_until

TINY = Path(__file__).parents[2] / "service/assets/tiny"
IDLE_S = 8


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The tiny model served, and a second entry of it that no request has named yet."""
    environment.ensure()
    directory = tmp_path_factory.mktemp("many")
    models = directory / "models.toml"
    models.write_text(f'[models.second]\npath = "{TINY}"\nweights_gb = 0.004\n{long_and_plain(directory)}')
    settings = {"SERVICE_MODELS_FILE": str(models), "SERVICE_SCALEDOWN_WINDOW": str(IDLE_S), "API_KEYS": "admin=my-key"}
    with Service(directory, "tiny", **settings) as service:
        yield service.wait_ready()
        left = engines(service)
        service.signal(signal.SIGINT)
        assert service.wait_ended(15) == 0, service.story
        assert not any(engine.is_running() for engine in left), service.story


def long_and_plain(directory: Path) -> str:
    """Return the entry of a copy of the model with a context of 49,152 tokens and a template that takes no tools."""
    shutil.copytree(TINY, directory / "long")
    config = json.loads((TINY / "config.json").read_text())
    (directory / "long" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 65536}))
    (directory / "plain.jinja").write_text(
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fields = 'max_model_len = 49152\nchat_template = "plain.jinja"\nfallback = ["tiny"]\n'
    return f'[models.long]\npath = "long"\n{fields}'


def engines(service: Service) -> list[psutil.Process]:
    """Return the leaders of the service's engines, oldest first."""
    children = psutil.Process(service.pid).children()
    leaders = [child for child in children if "vllm_service.main" in child.cmdline()]
    return sorted(leaders, key=lambda process: process.create_time())


def post(service: Service, body: object, headers: dict[str, str] | None = None, **options: object) -> requests.Response:
    """POST a chat with the key."""
    return requests.post(
        f"{service.url}/v1/chat/completions",
        json=body,
        headers={"Authorization": "Bearer my-key", **(headers or {})},
        timeout=120,
        **options,  # type: ignore[arg-type]
    )


def listed(service: Service, model: str) -> dict[str, object]:
    """Return what `/v1/models` says of a model; that wakes nothing."""
    answer = requests.get(f"{service.url}/v1/models", headers={"Authorization": "Bearer my-key"}, timeout=30).json()
    return dict(next(entry for entry in answer["data"] if entry["id"] == model))


def state(service: Service, model: str) -> str:
    """Return the state of a model's pool."""
    return str(listed(service, model)["state"])


def test_hundred_clients_of_a_cold_model_start_one_engine_and_are_all_answered(service: Service) -> None:
    """A stream waits with them."""
    before = engines(service)
    assert state(service, "second") == "cold"
    with ThreadPoolExecutor(101) as pool:
        stream = pool.submit(post, service, {"model": "second", "stream": True, **QUESTION})
        wait_until(lambda: state(service, "second") == "waking", 10, service)
        answers = list(pool.map(lambda _: post(service, {"model": "second", **QUESTION}), range(100)))
        assert "data: [DONE]" in stream.result().text
    assert {answer.status_code for answer in answers} == {200}
    assert all("Paris" in answer.json()["choices"][0]["message"]["content"] for answer in answers)
    assert len([engine for engine in engines(service) if engine not in before]) == 1


def test_directory_has_the_parsers_and_the_context_that_its_files_show(service: Service) -> None:
    """An entry with nothing but a path calls tools and thinks as the built-in entry of that model does."""
    asked = dialogue("weather-call")
    message = post(service, {"model": "second", **asked.request, "temperature": 0}).json()["choices"][0]["message"]
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == asked.tool_calls[0]["name"]
    asked = dialogue("thinking")
    message = post(service, {"model": "second", **asked.request, "temperature": 0}).json()["choices"][0]["message"]
    assert (message["reasoning"].strip(), message["content"].strip()) == (asked.reasoning, asked.content)
    assert listed(service, "second")["max_model_len"] == 4096


def test_cold_model_has_its_fallback_answer_until_it_is_ready(service: Service) -> None:
    """The engine of the fallback answers at once; that of the wanted model starts meanwhile and takes the next one."""
    assert post(service, {"model": "tiny", **QUESTION}).status_code == 200
    assert state(service, "long") == "cold"
    answer = post(service, {"model": "long", **QUESTION}, headers={"X-Fallback": "allow"})
    assert (answer.status_code, answer.headers["X-Served-Model"], answer.json()["model"]) == (200, "tiny", "tiny")
    assert "Paris" in answer.json()["choices"][0]["message"]["content"]
    wait_until(lambda: state(service, "long") == "ready", 60, service)
    answer = post(service, {"model": "long", **QUESTION}, headers={"X-Fallback": "allow"})
    assert (answer.status_code, answer.json()["model"]) == (200, "long")
    assert "X-Served-Model" not in answer.headers


def test_entry_with_a_context_of_its_own_gets_it_without_a_gpu(service: Service) -> None:
    """And the list tells what the engine really has; a model without a tool parser says which field to set."""
    assert listed(service, "qwen3-8b")["max_model_len"] == 8192
    post(service, {"model": "long", **QUESTION})
    answer = post(service, {"model": "long", **dialogue("weather-call").request})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "tools_not_supported")
    assert "Set tool_call_parser in its entry of the models file" in answer.json()["error"]["message"]
    assert listed(service, "long")["max_model_len"] == 49152
    filler = "word " * 12_000
    answer = post(service, {"model": "long", "messages": [{"role": "user", "content": filler}], "max_tokens": 1})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] > 12_000


def test_model_that_cannot_run_here_is_marked_and_refused_at_once(service: Service) -> None:
    """236 GB of weights on a machine without a GPU: no price, no wake, and an answer that no client repeats."""
    entry = listed(service, "qwen3-235b")
    assert (entry["state"], entry["dollars_per_hour"]) == ("does_not_fit", None)
    assert "236.4 GB" in str(entry["reason"])
    before = engines(service)
    answer = post(service, {"model": "qwen3-235b", **QUESTION})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_too_large")
    assert engines(service) == before


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
    victim = next(engine for engine in engines(service) if "second" in engine.cmdline())
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
