"""Requests through the deployed gateway to real engines in real containers.

Each test that wants a cold pool has a GPU tier of its own, the others share one: `tiny-t4` is the tiny model on app
`vllm-t4`.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import modal
import openai
import psutil
import pytest

from tests.contract.conftest import CHAT, call, deploy, generating, posted, refused_websocket
from tests.engine.dialogues import COUNTING, QUESTION
from tests.engine.running import BOOT_S, check_stops
from tests.fakes.modal import ContainerRuntime, ModalPlane, TaskState

from .gateways import APP, KEY, TAG, deploy_gateway, put_secrets

# What the gateway answers itself, wakes nothing, and needs no engine; the files of its pages are in its image.
OWN = (
    *("/health", "/docs", "/metrics", "/v1/key", "/v1/requests", "/admin/pools", "/admin/boots"),
    *("/", "/console/main.js", "/docs/swagger-ui-bundle.js", "/openapi.json"),
)
ENDED = {"completed", "failed", "expired"}  # states of a batch


@pytest.fixture(scope="module")
def gateway_plane(tmp_path_factory: pytest.TempPathFactory, engine_runtime: ContainerRuntime) -> Iterator[ModalPlane]:
    """A plane with the gateway deployed, and no tier yet; the real engine is in its containers."""
    runtime = replace(engine_runtime, environment={**engine_runtime.environment, "LEASE_EXPIRY_S": "8"})  # else 60
    with ModalPlane(tmp_path_factory.mktemp("plane"), container=runtime) as plane:
        put_secrets(plane)
        deploy_gateway(plane, SERVICE_MODEL="tiny")
        yield plane
        assert plane.failures == []
        assert plane.unknown_calls == []


@pytest.fixture
def url(gateway_plane: ModalPlane) -> str:
    """Where clients send their requests."""
    return gateway_plane.url_of(APP, TAG)


@contextmanager
def _deploying(gateway_plane: ModalPlane) -> Iterator[Callable[..., str]]:
    """A function that deploys the tier of a GPU and returns the name of the tiny model there; its engines end after."""
    before = len(gateway_plane.tasks)

    def deployed(gpu: str, **environment: str) -> str:
        settings = {"SERVICE_MODEL": "tiny", "SERVICE_GPU": gpu, "SERVICE_MAX_INPUTS": "200", **environment}
        deploy(gateway_plane, **settings)
        model = f"tiny-{gpu.lower()}"
        if "SERVICE_APP" not in environment:  # the gateway of that app is another
            url = f"{gateway_plane.url_of(APP, TAG)}/v1/models/{model}"
            known = lambda: json.loads(call(url, headers=KEY)[1])["state"] != "not_deployed"  # noqa: E731 - one line
            gateway_plane.wait_until(known, 20, "the gateway to look the tier up again, if it had missed it")
        return model

    yield deployed
    for task in gateway_plane.tasks[before:]:
        if task.tag == "Server" and task.state is not TaskState.DEAD:
            task.kill()


@pytest.fixture
def tier(gateway_plane: ModalPlane) -> Iterator[Callable[..., str]]:
    """A function that deploys a tier of the test's own and returns the name of the tiny model there."""
    with _deploying(gateway_plane) as deployed:
        yield deployed


@pytest.fixture(scope="module")
def warm(gateway_plane: ModalPlane) -> Iterator[str]:
    """The name of the tiny model on a tier that tests share that need an engine, not a cold pool."""
    with _deploying(gateway_plane) as deployed:
        yield deployed("L40S")


def replicas(plane: ModalPlane, model: str) -> list[Any]:
    """Return the containers of a tier, by the name of its model, oldest first."""
    return [task for task in plane.tasks if task.app == f"vllm-{model.removeprefix('tiny-')}"]


def content(body: bytes) -> str:
    """Return what an answer, or all chunks of a stream, say."""
    events = [line.removeprefix(b"data: ") for line in body.splitlines() if line.startswith(b"data: {")]
    choices = [json.loads(event)["choices"] for event in events] or [json.loads(body)["choices"]]
    parts = [choice["delta"] if "delta" in choice else choice["message"] for listed in choices for choice in listed]
    return "".join(part.get("content") or "" for part in parts)


def _completions(plane: ModalPlane) -> int:
    """Return how many prompts all gateways have had answered, by their logs."""
    logs = "".join(task.log for task in plane.tasks if (task.app, task.tag) == (APP, TAG))
    lines = [json.loads(line[line.index("{") :]) for line in logs.splitlines() if '"path":"/v1/completions"' in line]
    return sum(line["status"] == 200 for line in lines)


def asked(url: str, body: Any) -> AbstractContextManager[http.client.HTTPResponse]:
    """Send a chat request with a key; the answer is open, and leaving the block leaves the stream."""
    return posted(f"{url}{CHAT}", body, KEY)


def check_streams(answer: http.client.HTTPResponse) -> None:
    """Insist that this is a stream, and read its first event; comments may come before it."""
    assert answer.status == 200, answer.read()
    while (line := answer.readline()).startswith(b":") or line == b"\n":
        pass
    assert line.startswith(b"data: "), line


def test_gateway_without_a_valid_key_wakes_nothing(
    gateway_plane: ModalPlane, url: str, tier: Callable[..., str]
) -> None:
    """Without a key, or with a wrong one, the answer is 401 and no container of a tier starts."""
    model = tier("A10")
    for headers in ({}, {"Authorization": "Bearer sk-unknown"}, {"x-api-key": "sk-unknown"}):
        status, body = call(f"{url}/v1/chat/completions", {"model": model, **QUESTION}, headers)
        assert status == 401
        assert json.loads(body)["error"]["code"] == "invalid_api_key"
    assert replicas(gateway_plane, model) == []


def test_gateway_refuses_websockets(gateway_plane: ModalPlane, url: str) -> None:
    """Modal passes them on; the gateway refuses them, with a key and without, and wakes nothing."""
    for headers in (KEY, {}):
        assert refused_websocket(f"{url}/v1/realtime?model=tiny-a10", headers) == 403
    assert [task.tag for task in gateway_plane.tasks if task.tag != TAG] == []


def test_gateway_refuses_before_the_body_is_sent(url: str) -> None:
    """A client that declares a body gets its 401 or 413 before it has sent a byte of it."""
    parts = urlsplit(url)
    for key, size, status in (("sk-unknown", 100, 401), ("sk-alice", 32 * 2**20 + 1, 413)):
        with closing(http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=10)) as connection:
            connection.putrequest("POST", "/v1/chat/completions")
            connection.putheader("Authorization", f"Bearer {key}")
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", str(size))
            connection.endheaders()
            with closing(connection.getresponse()) as answer:
                assert answer.status == status
                assert answer.getheader("WWW-Authenticate") == ("Bearer" if status == 401 else None)


def test_gateway_lists_models_with_their_states_and_wakes_nothing(
    gateway_plane: ModalPlane, url: str, tier: Callable[..., str]
) -> None:
    """Not deployed, cold, waking, ready; this, the console and the gateway's other own routes start no container.

    What wakes and stops a model are the console's commands.
    """
    assert _state(url, "qwen3-235b") == "not_deployed"
    tier("L4")
    assert _state(url, "tiny") == "cold"
    entry = _entry(url, "tiny")
    assert (entry["gpu"], entry["max_model_len"]) == ("L4", 2048)
    assert entry["dollars_per_hour"] > 0
    for path in OWN:
        assert call(f"{url}{path}", headers=KEY)[0] == 200, path
    assert replicas(gateway_plane, "tiny-l4") == []

    assert _commanded(url, "wake") == "waking"
    assert _state(url, "tiny") == "waking"
    gateway_plane.wait_until(lambda: _state(url, "tiny") == "ready", BOOT_S, "the wake")
    assert call(f"{url}/v1/chat/completions", {"model": "llm", **QUESTION}, KEY)[0] == 200
    own = json.loads(call(f"{url}/admin/pools", headers=KEY)[1])["data"]
    assert [(one["gpu"], one["usual_s"] > 0) for one in own if one["name"] == "tiny"] == [("L4", True)]
    boots = lambda: json.loads(call(f"{url}/admin/boots?model=tiny", headers=KEY)[1])["data"]  # noqa: E731 - one line
    gateway_plane.wait_until(lambda: [one["outcome"] for one in boots()] == ["ready"], 20, "the record of this boot")

    (pool,) = (pool for pool in gateway_plane.pools if pool.app == "vllm-l4" and pool.parameters.get("model") == "tiny")
    _commanded(url, "stop")
    gateway_plane.wait_until(lambda: not pool.live, 30, "the replica's end")
    gateway_plane.wait_until(lambda: pool.autoscaler.scaledown_window == 900, 30, "the settings from before the stop")
    gateway_plane.wait_until(lambda: _state(url, "tiny") == "cold", 10, "the end of the stop")
    assert len(replicas(gateway_plane, "tiny-l4")) == 1


def _commanded(url: str, what: str) -> str:
    """Wake or stop the model as the console does, and return its state then."""
    status, body = call(f"{url}/admin/pools/{what}", {"model": "tiny"}, KEY)
    assert status == 202, body
    return str(json.loads(body)["state"])


def _entry(url: str, model: str) -> Any:
    listed = json.loads(call(f"{url}/v1/models", headers=KEY)[1])["data"]
    return next(entry for entry in listed if entry["id"] == model)


def _state(url: str, model: str) -> str:
    return str(_entry(url, model)["state"])


def test_gateway_to_a_tier_that_is_not_deployed_names_the_command(url: str) -> None:
    """The answer names the deploy that is missing."""
    status, body = call(f"{url}/v1/chat/completions", {"model": "tiny-b200", **QUESTION}, KEY)
    assert status == 503
    assert "Deploy it: vllm-service deploy tiny tiny-b200." in json.loads(body)["error"]["message"]
    status, body = call(f"{url}/v1/chat/completions", {"model": "tini", **QUESTION}, KEY)
    assert (status, json.loads(body)["error"]["code"]) == (404, "model_not_found")
    assert "'tiny'" in json.loads(body)["error"]["message"]


def test_gateway_keeps_a_stream_open_while_the_pool_wakes(
    gateway_plane: ModalPlane, url: str, tier: Callable[..., str]
) -> None:
    """Comments come until the engine answers, across Modal's redirects; then the engine's chunks, to the last one.

    The first comment comes after 15 s, and here the redirects after 17 s: until then the container stands still.
    """
    model = tier("T4")
    gateway_plane.web_endpoints.redirect_after_s = 17.0
    try:
        with ThreadPoolExecutor(1) as threads:
            held = threads.submit(_suspended, gateway_plane, model)
            with asked(url, {"model": model, "stream": True, **QUESTION}) as answer:
                assert answer.status == 200
                assert answer.getheader("Content-Type", "").startswith("text/event-stream")
                assert answer.readline().startswith(b": waking tiny on T4, ")
                assert replicas(gateway_plane, model)[0].state is TaskState.STARTING
                gateway_plane.wait_until(lambda: 303 in _health_statuses(gateway_plane), 10, "Modal's redirect")
                for process in held.result():
                    process.resume()
                body = answer.read()
    finally:
        gateway_plane.web_endpoints.redirect_after_s = 150.0
    assert "Paris" in content(body)
    assert body.rstrip().endswith(b"data: [DONE]")

    status, body = call(f"{url}/v1/chat/completions", {"model": model, **QUESTION}, KEY)
    assert status == 200, body
    assert "Paris" in content(body)
    assert len(replicas(gateway_plane, model)) == 1


def _health_statuses(plane: ModalPlane) -> list[int]:
    """Return how the pool's health checks were answered."""
    return [status for _, path, status in plane.web_endpoints.requests if path.startswith("/health?model=tiny")]


def _suspended(plane: ModalPlane, model: str) -> list[psutil.Process]:
    """Stop the processes of a model's container as soon as there are any, and return them."""
    plane.wait_until(lambda: any(task.members() for task in replicas(plane, model)), 30, "a container")
    processes = [psutil.Process(pid) for task in replicas(plane, model) for pid in task.members()]
    for process in processes:
        process.suspend()
    return processes


def test_gateway_with_a_hundred_clients_of_a_cold_pool_starts_one_container(
    gateway_plane: ModalPlane, url: str, tier: Callable[..., str]
) -> None:
    """All are served by the one engine that their first request woke, streams and others alike."""
    model, before = tier("A100"), _asked_for_health(gateway_plane)

    def ask(number: int) -> tuple[int, str]:
        with asked(url, {"model": model, "stream": bool(number % 2), **QUESTION}) as answer:
            return answer.status, content(answer.read())

    with ThreadPoolExecutor(100) as threads:
        answers = list(threads.map(ask, range(100)))
    assert [status for status, _ in answers] == [200] * 100
    assert all("Paris" in said for _, said in answers)
    assert len(replicas(gateway_plane, model)) == 1
    assert _asked_for_health(gateway_plane) - before == 1


def _asked_for_health(plane: ModalPlane) -> int:
    """Return how many health checks were sent, each of which can wake a pool."""
    return sum(path.startswith("/health?") for _, path, _ in plane.web_endpoints.requests)


def test_gateway_whose_client_leaves_stops_the_generation_within_a_second(
    gateway_plane: ModalPlane, url: str, warm: str
) -> None:
    """Through both containers, the engine runs no request any more."""
    pool = modal.Cls.from_name("vllm-l40s", "Server", client=gateway_plane.client())(model="tiny")
    with asked(url, {"model": warm, **COUNTING}) as answer:
        check_streams(answer)
        gateway_plane.wait_until(lambda: generating(pool), 10, "the generation to run")
    check_stops(lambda: generating(pool))


def test_gateway_whose_pool_dies_under_a_stream_ends_it_with_an_error(
    gateway_plane: ModalPlane, url: str, warm: str
) -> None:
    """The client is told, in the stream; the next request is served by a new container."""
    assert call(f"{url}/v1/chat/completions", {"model": warm, **QUESTION}, KEY)[0] == 200
    first = replicas(gateway_plane, warm)[-1]
    with asked(url, {"model": warm, **COUNTING}) as answer:
        check_streams(answer)
        first.kill()
        rest = answer.read()
    events = [line.removeprefix(b"data: ") for line in rest.splitlines() if b'"error"' in line]
    assert [json.loads(event)["error"]["code"] for event in events] == ["engine_lost"]

    status, body = call(f"{url}/v1/chat/completions", {"model": warm, **QUESTION}, KEY)
    assert status == 200, body
    assert replicas(gateway_plane, warm)[-1] is not first


def test_gateway_forwards_the_clients_key_where_engines_check_it(
    gateway_plane: ModalPlane, tier: Callable[..., str]
) -> None:
    """With `SERVICE_DIRECT_AUTH=keys` the tier needs no proxy token, and the engine knows the key."""
    environment = {"SERVICE_APP": "team", "SERVICE_DIRECT_AUTH": "keys"}
    tier("L4", **environment)
    url = deploy_gateway(gateway_plane, SERVICE_MODEL="tiny", SERVICE_GPU="L4", **environment)
    status, body = call(f"{url}/v1/chat/completions", {"model": "tiny", **QUESTION}, KEY)
    assert status == 200, body
    assert "Paris" in content(body)
    direct = gateway_plane.url_of("team", "Server", "serve")
    assert call(f"{direct}/v1/models?model=tiny")[0] == 401
    assert call(f"{direct}/v1/models?model=tiny", headers=KEY)[0] == 200


def test_batch_goes_on_in_the_next_gateway_after_its_container_was_killed(
    gateway_plane: ModalPlane, url: str, warm: str
) -> None:
    """The volume has what was committed; a function that was called for the batch keeps its gateway up."""
    body = {"model": warm, "prompt": "Hi", "max_tokens": 8, "ignore_eos": True}
    line = {"method": "POST", "url": "/v1/completions", "body": body}
    lines = "\n".join(json.dumps({"custom_id": str(number), **line}) for number in range(60))
    with openai.OpenAI(base_url=f"{url}/v1", api_key="sk-alice", max_retries=5, timeout=BOOT_S) as client:
        file = client.files.create(file=("in.jsonl", lines.encode()), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="1h")
        gateway_plane.wait_until(lambda: client.batches.retrieve(batch.id).status != "validating", 60, "the begin")
        gateways = [task for task in gateway_plane.tasks if (task.app, task.tag) == (APP, TAG)]
        (gateway,) = [task for task in gateways if task.state is not TaskState.DEAD]
        gateway.kill()
        gateway_plane.wait_until(lambda: client.batches.retrieve(batch.id).status in ENDED, BOOT_S, "the batch's end")
        batch = client.batches.retrieve(batch.id)
        assert batch.status == "completed", batch.errors
        assert batch.error_file_id is None, client.files.content(batch.error_file_id).text[:1000]
        answers = client.files.content(batch.output_file_id or "").text.splitlines()

    assert sorted(int(json.loads(answer)["custom_id"]) for answer in answers) == [*range(60)]
    assert [task.tag for task in gateway_plane.tasks if task.tag == "watch_batch"]


def test_batch_goes_on_after_a_deploy_and_no_line_is_answered_twice(
    gateway_plane: ModalPlane, url: str, warm: str
) -> None:
    """Until the gateway of the earlier deploy has answered its last stream and ended, it drives the batch."""
    before, count = _completions(gateway_plane), 160
    body = {"model": warm, "prompt": "Hi", "max_tokens": 64, "ignore_eos": True}
    line = {"method": "POST", "url": "/v1/completions", "body": body}
    lines = "\n".join(json.dumps({"custom_id": str(number), **line}) for number in range(count))
    with openai.OpenAI(base_url=f"{url}/v1", api_key="sk-alice", max_retries=5, timeout=BOOT_S) as client:
        file = client.files.create(file=("in.jsonl", lines.encode()), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="1h")
        gateway_plane.wait_until(lambda: client.batches.retrieve(batch.id).status == "in_progress", 60, "the begin")
        with asked(url, {"model": warm, **COUNTING}) as stream:
            check_streams(stream)
            deploy_gateway(gateway_plane, SERVICE_MODEL="tiny")
            assert client.batches.retrieve(batch.id).status not in ENDED, "it ended before the deploy"
            assert b'"error"' not in stream.read()
        gateway_plane.wait_until(lambda: client.batches.retrieve(batch.id).status in ENDED, BOOT_S, "the batch's end")
        batch = client.batches.retrieve(batch.id)
        assert batch.status == "completed", batch.errors
        answers = client.files.content(batch.output_file_id or "").text.splitlines()

    assert sorted(int(json.loads(answer)["custom_id"]) for answer in answers) == [*range(count)]
    assert _completions(gateway_plane) - before == count, "lines were sent by both gateways"
