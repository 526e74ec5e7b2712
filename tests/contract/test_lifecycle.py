"""The lifecycle of a replica in the real container entrypoint and engine: prepare, checkpoint, start, serve, stop."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import modal
import psutil
import pytest

from service.pools import variant
from tests.contract.conftest import (
    CHAT,
    answers_right,
    call,
    deploy,
    deployed,
    engine_leader,
    generating,
    modal_cli,
    pool_of,
    refused_websocket,
    streamed,
    tasks_of,
)
from tests.engine.dialogues import COUNTING, QUESTION
from tests.engine.running import check_stops
from tests.fakes.modal import ContainerRuntime, ModalPlane, TaskState

LONG = {**COUNTING, "messages": QUESTION["messages"], "temperature": 0.01, "n": 8, "max_tokens": 300}  # two seconds
IDLE_END_S = 2 + 25  # of the window, and well within the grace that a container has before it is killed


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, engine_runtime: ContainerRuntime) -> Iterator[ModalPlane]:
    """A plane with the tiny model's tier deployed and the real engine in its containers."""
    with deployed(tmp_path_factory.mktemp("plane"), engine_runtime) as plane:
        yield plane


@pytest.fixture
def h200(tiny: ModalPlane, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pool of the deployed class on another GPU than the tier's, as the service's own function makes it."""
    monkeypatch.setattr(modal.Cls, "from_name", functools.partial(modal.Cls.from_name, client=tiny.client()))
    return variant("tiny", "H200", scaledown_window=120, app="vllm-l4")


def _ended_by_itself(task: Any) -> bool:
    """Tell whether the engine ended by the exit hook, without being killed."""
    return task.exit_code == 0 and not task.left_behind and "Application shutdown complete" in task.log


def _amid_generation(pool: Any) -> Any:
    """Return a call that the engine works on. One that is over before a busy machine asks is followed by another."""
    while True:
        running = pool.complete.spawn(CHAT, {"model": "llm", **COUNTING, "stream": False})
        while not _is_over(running):
            if generating(pool):
                return running


def _is_over(running: Any) -> bool:
    """Tell whether a call has its result."""
    try:
        running.get(timeout=0)
    except TimeoutError:
        return False
    return True


def test_replica_serves_over_http_after_a_checkpoint_and_stops_cleanly(tiny: ModalPlane) -> None:
    """A request with a proxy token boots a replica through its checkpoint and is answered; so is a stream, in pieces.

    Preemption ends the replica clean.
    """
    held: list[tuple[bool, list[Any]]] = []
    tiny.snapshots.before_restore.append(lambda task: held.append(_engine_at_rest(task)))
    token = tiny.proxy_tokens.create()
    url = tiny.url_of("vllm-l4", "Server", "serve")
    assert call(f"{url}/health?model=tiny")[0] == 401, "a stranger is refused"
    assert not tiny.tasks, "and starts no container"

    status, body = call(f"{url}{CHAT}?model=tiny", {"model": "tiny", **QUESTION}, token.headers)

    task = tiny.tasks[-1]
    assert status == 200, body + task.log.encode()
    assert "Paris" in json.loads(body)["choices"][0]["message"]["content"]
    assert task.restored, "prepare ended in a checkpoint, and start came after the restore"
    assert held == [(True, [])], "at the checkpoint the engine's program was running, with no socket open"
    assert '"outcome": "ready"' in task.log, "the boot's record"
    _check_stream(tiny, task)
    members = task.members()
    task.preempt(grace_s=30)
    tiny.wait_until(lambda: task.state is TaskState.DEAD, 40, "the replica's end")
    assert members
    assert _ended_by_itself(task), task.log


def _engine_at_rest(task: Any) -> tuple[bool, list[Any]]:
    """Return whether the engine's program runs in a container, and the internet sockets that it holds."""
    processes = [psutil.Process(pid) for pid in task.members()]
    engines = [process for process in processes if "vllm_service.main" in process.cmdline()]
    links = [str(fd.readlink()) for engine in engines for fd in Path(f"/proc/{engine.pid}/fd").iterdir()]
    return bool(engines), [link for link in links if link.startswith("socket:")]


def _check_stream(plane: ModalPlane, task: Any) -> None:
    """Read a stream through `serve` to its end: what comes first comes while the engine has not done the rest."""
    pool, cores = pool_of(plane, "tiny"), engine_leader(task).children(recursive=True)
    with streamed(plane, "tiny", LONG) as answer:
        assert answer.status == 200
        assert answer.getheader("Content-Type", "").startswith("text/event-stream")
        first = answer.readline()
        for core in cores:
            core.suspend()
        assert first.startswith(b"data: {")
        plane.wait_until(lambda: generating(pool), 10, "the engine to be amid the request")
        for core in cores:
            core.resume()
        events = [line.removeprefix(b"data: ") for line in (first + answer.read()).splitlines() if line]
    assert events.pop() == b"[DONE]"
    choices = [choice for event in events for choice in json.loads(event)["choices"] if choice["index"] == 0]
    assert "Paris" in "".join(choice["delta"].get("content") or "" for choice in choices)


def test_variant_on_another_gpu_answers_complete(tiny: ModalPlane, h200: Any) -> None:
    """`service.pools.variant` returns a pool of its own, with its options, and `complete` reaches its engine."""
    answers_right(h200)
    assert h200.complete.remote("/health") == (200, {"status": "ok"})
    status, answer = h200.complete.remote("/invocations", {"model": "llm", **QUESTION})
    assert status == 404
    assert "/invocations" in answer["error"]["message"]
    assert tiny.tasks[-1].gpu == "H200:1"
    assert tiny.pools[-1].autoscaler.scaledown_window == 120


def test_cancelled_complete_on_another_gpu_stops_the_generation(h200: Any) -> None:
    """Cancelling a call closes its connection to the engine, which then runs no request, and answers the next."""
    running = _amid_generation(h200)
    running.cancel()
    check_stops(lambda: generating(h200))
    answers_right(h200)


def test_idle_replica_ends_by_itself(tiny: ModalPlane, h200: Any) -> None:
    """After the scaledown window the exit hook stops the engine, long before Modal would kill it."""
    assert h200.complete.remote("/health") == (200, {"status": "ok"})
    task = tiny.pools[-1].tasks[-1]
    h200.complete.autoscaler.update(scaledown_window=2)
    tiny.wait_until(lambda: task.state is TaskState.DEAD, IDLE_END_S, "the end of the idle replica")
    assert _ended_by_itself(task), task.log


def test_two_parameter_sets_at_once_are_two_replicas(tiny: ModalPlane) -> None:
    """Requests for two parameter sets at the same time boot two containers, each with its own engine on port 8000."""
    token = tiny.proxy_tokens.create()
    url = tiny.url_of("vllm-l4", "Server", "serve")
    models = ("llm", "Tiny")
    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(call, f"{url}/v1/models?model={name}", headers=token.headers) for name in models]
        answers = [future.result() for future in asked]
    assert [status for status, _ in answers] == [200, 200]
    first, second = (task for task in tiny.tasks if task.parameters["model"] in models)
    assert {first.parameters["model"], second.parameters["model"]} == set(models)
    assert second.started_at < first.ready_at, "both boot at once"


def test_websocket_gets_no_further_than_the_engines_guard(tiny: ModalPlane) -> None:
    """Modal's proxy in the container is refused its handshake and fails; without a proxy token it is not asked."""
    url = f"{tiny.url_of('vllm-l4', 'Server', 'serve')}/v1/realtime?model=llm"
    assert refused_websocket(url, {}) == 401
    assert refused_websocket(url, tiny.proxy_tokens.create().headers) == 500
    replica = tasks_of(tiny, "llm")[-1]
    assert "WSServerHandshakeError: 426" in replica.log
    answers_right(pool_of(tiny, "llm"))
    assert replica.is_live


def test_replica_with_too_few_gpus_fails_by_the_settings_deployed_last(tmp_path: Path, client_mount: Path) -> None:
    """`n_gpu` over what the container shows ends the boot with both counts; redeployed, it is refused in `prepare`."""
    runtime = ContainerRuntime(client_path=client_mount)
    with ModalPlane(tmp_path, container=runtime) as plane:
        deploy(plane, SERVICE_MODEL="tiny", SERVICE_SNAPSHOT="off")
        pool = modal.Cls.from_name("vllm-l4", "Server", client=plane.client())(model="tiny", n_gpu=2)
        with pytest.raises(Exception, match="n_gpu=2 GPUs and 1 are visible"):
            pool.complete.remote("/health")
        deploy(plane, SERVICE_MODEL="tiny", SERVICE_SNAPSHOT="gpu")
        with pytest.raises(Exception, match="A GPU memory snapshot works on one GPU, and 'tiny' is to run on 2"):
            pool.complete.remote("/health")


def test_modal_run_holds_two_conversations(tmp_path: Path, engine_runtime: ContainerRuntime) -> None:
    """`modal run -m service.server --model M` checks health and prints what the pirate and Jar Jar say; M must fit."""
    with ModalPlane(tmp_path, container=engine_runtime) as plane:
        settings = {"SERVICE_MODEL": "qwen3-0.6b", "SERVICE_GPU": "L4"}
        done = modal_cli(plane, "run", "-m", "service.server", "--model", "gemma-3-27b", **settings)
        assert done.returncode == 1
        assert "Model 'gemma-3-27b' does not fit on L4" in done.stderr
        assert plane.tasks == []
        question = ("--content", "What is the capital of France?")
        done = modal_cli(plane, "run", "-m", "service.server", "--model", "tiny", *question, **settings)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Healthy" in done.stdout
        assert done.stdout.count("Sending to tiny") == done.stdout.count(question[1]) == 2
        assert "Jar Jar" in done.stdout
        assert plane.snapshots.checkpoints == [], "an ephemeral app has none: both hooks run back to back"
        assert [task.state for task in plane.tasks] == [TaskState.DEAD]
        assert _ended_by_itself(plane.tasks[0]), plane.tasks[0].log
        assert plane.failures == []
