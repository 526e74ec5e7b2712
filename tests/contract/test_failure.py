"""Failures on Modal, with the real entrypoint and engine: each is reported, and nothing is left running."""

from __future__ import annotations

import http.client
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.gateway.pool import FAILED_FOR_S
from tests.contract.conftest import (
    CHAT,
    REPOSITORY,
    answers_right,
    call,
    deploy,
    deployed,
    engine_leader,
    pool_of,
    reaching,
    streamed,
    tasks_of,
)
from tests.contract.gateways import KEY, deploy_gateway, put_secrets
from tests.engine.dialogues import COUNTING
from tests.engine.running import BOOT_S
from tests.fakes.hub import Hub, Repository, serving
from tests.fakes.modal import ContainerRuntime, ModalPlane, TaskState

REVISION = "a" * 40
TINY = REPOSITORY / "service/assets/tiny"
MODELS = f"""
[models.from-hub]
hub_id = "me/tiny"
revision = "{REVISION}"
gpu = "L4"
max_model_len = 2048
weights_gb = 0.004

[models.from-hub-too]
hub_id = "me/tiny-too"
revision = "{REVISION}"
gpu = "L4"

[models.bad-flag]
hub_id = "me/tiny"
revision = "{REVISION}"
gpu = "L4"
extra_args = ["--no-such-flag"]
"""
CHAT_OF_BAD_FLAG = {"model": "bad-flag", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A hub that has the tiny model."""
    files = {file.name: file.read_bytes() for file in TINY.iterdir()}
    with serving(Hub(repositories=dict.fromkeys(("me/tiny", "me/tiny-too"), Repository(REVISION, files)))) as hub:
        yield hub
    assert hub.unknown == []


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models file that is deployed."""
    file = tmp_path_factory.mktemp("models") / "models.toml"
    file.write_text(MODELS)
    return file


@pytest.fixture(scope="module")
def plane(
    tmp_path_factory: pytest.TempPathFactory, engine_runtime: ContainerRuntime, hub: Hub, models: Path
) -> Iterator[ModalPlane]:
    """A plane with the tier deployed, whose containers reach the hub."""
    directory = tmp_path_factory.mktemp("plane")
    runtime = reaching(engine_runtime, hub)
    with deployed(directory / "plane", runtime, SERVICE_MODELS_FILE=str(models)) as plane:
        yield plane


def test_full_cache_volume_is_logged_and_the_replica_serves(plane: ModalPlane) -> None:
    """The compile caches cannot be saved for the next replica; no request waits or fails for that.

    It is the first test here: a volume that is full from the start has no files yet.
    """
    volume = plane.volumes["vllm-cache"]
    volume.capacity_bytes = 1
    try:
        answers_right(pool_of(plane, "from-hub"), "me/tiny")
        task = tasks_of(plane, "from-hub")[-1]
        plane.wait_until(lambda: "No space left on device" in task.log, 20, "the sentence about the volume")
    finally:
        volume.capacity_bytes = None
    assert "compile caches" in task.log
    assert [name for name in volume.files() if name.startswith("compiled/")] == []


def test_unknown_model_ends_the_hook_with_the_nearest_name(plane: ModalPlane) -> None:
    """A pool of an unregistered model fails with the service's own error and starts no engine."""
    with pytest.raises(Exception, match="Did you mean 'tiny'"):
        pool_of(plane, "tini").complete.remote("/health")
    plane.wait_until(lambda: tasks_of(plane, "tini")[-1].state is TaskState.DEAD, 20, "the container's end")
    assert not tasks_of(plane, "tini")[-1].left_behind


def test_engine_that_refuses_its_flags_ends_the_hook_with_the_flag(plane: ModalPlane) -> None:
    """An engine that dies before it is ready fails the boot with the root cause and leaves nothing running."""
    with pytest.raises(Exception, match=r"unrecognized arguments: --no-such-flag"):
        pool_of(plane, "bad-flag").complete.remote("/health")
    plane.wait_until(lambda: tasks_of(plane, "bad-flag")[-1].state is TaskState.DEAD, 20, "the container's end")
    assert not tasks_of(plane, "bad-flag")[-1].left_behind


def test_weights_are_fetched_once_and_committed(plane: ModalPlane, hub: Hub) -> None:
    """The first replica fetches the pinned revision into the volume and commits it; the next asks no hub."""
    answers_right(pool_of(plane, "from-hub"), "me/tiny")
    snapshot = f"hub/models--me--tiny/snapshots/{REVISION}/config.json"
    assert plane.volumes["huggingface-cache"].read(snapshot) == (TINY / "config.json").read_bytes()

    before = len(hub.requests)
    task = tasks_of(plane, "from-hub")[-1]
    task.kill()
    plane.wait_until(lambda: task.state is TaskState.DEAD, 20, "the container's end")
    assert pool_of(plane, "from-hub").complete.remote("/health") == (200, {"status": "ok"})
    assert len(hub.requests) == before


def test_boot_that_cannot_work_is_paid_once(plane: ModalPlane, models: Path) -> None:
    """The gateway answers with the recorded reason and starts no container, until the app is deployed again."""
    put_secrets(plane)
    url = deploy_gateway(plane, SERVICE_MODEL="tiny", SERVICE_MODELS_FILE=str(models)) + CHAT
    if not tasks_of(plane, "bad-flag"):  # the test before was not run
        assert call(url, CHAT_OF_BAD_FLAG, KEY)[0] == 503
    assert "failures/vllm-l4/bad-flag.json" in plane.volumes["vllm-cache"].files()
    before = len(tasks_of(plane, "bad-flag"))
    for _ in range(2):
        status, body = call(url, CHAT_OF_BAD_FLAG, KEY)
        error = json.loads(body)["error"]
        assert (status, error["code"]) == (503, "model_failed")
        assert "unrecognized arguments: --no-such-flag" in error["message"]
        assert "'vllm-service deploy --retry' tries again" in error["message"]
    assert len(tasks_of(plane, "bad-flag")) == before

    deploy(plane, SERVICE_MODEL="tiny", SERVICE_MODELS_FILE=str(models))
    time.sleep(FAILED_FOR_S)  # until when the gateway repeats the answer
    assert call(url, CHAT_OF_BAD_FLAG, KEY)[0] == 503
    assert len(tasks_of(plane, "bad-flag")) > before
    log = tasks_of(plane, "bad-flag")[-1].log
    assert "so none was begun now" in log, "nothing has changed, so the replica spawns no engine"
    assert "unrecognized arguments" in log


def test_full_volume_ends_the_hook_with_both_figures(plane: ModalPlane) -> None:
    """Weights that the volume has no room for fail the boot before any engine is started."""
    volume = plane.volumes["huggingface-cache"]
    volume.capacity_bytes = 100_000
    try:
        with pytest.raises(Exception, match=r"me/tiny-too needs .* GB and .* has .* GB free"):
            pool_of(plane, "from-hub-too").complete.remote("/health")
    finally:
        volume.capacity_bytes = None
    plane.wait_until(lambda: tasks_of(plane, "from-hub-too")[-1].state is TaskState.DEAD, 20, "the container's end")
    assert "(EngineCore" not in tasks_of(plane, "from-hub-too")[-1].log


def test_preemption_during_prepare_leaves_nothing(plane: ModalPlane) -> None:
    """SIGINT while the engine imports ends it at once, and the request is served by another replica."""
    pool = pool_of(plane, "TINY")
    running = pool.complete.spawn("/health")
    plane.wait_until(lambda: any(len(t.members()) > 1 for t in tasks_of(plane, "TINY")), 30, "the engine's process")
    first = tasks_of(plane, "TINY")[0]
    assert first.state is TaskState.STARTING
    first.preempt(grace_s=10)
    plane.wait_until(lambda: first.state is TaskState.DEAD, 12, "the container's end")
    assert not first.left_behind
    assert first.exit_code == 0, "it was not killed"
    assert first.id not in plane.snapshots.checkpoints
    assert running.get(timeout=BOOT_S) == (200, {"status": "ok"})


def test_failing_restore_boots_a_fresh_replica(plane: ModalPlane) -> None:
    """A restore that fails costs a boot, not the request."""
    plane.snapshots.fail_next_restore()
    assert pool_of(plane, "llm").complete.remote("/health") == (200, {"status": "ok"})
    first, second = tasks_of(plane, "llm")
    assert first.state is TaskState.DEAD
    assert not first.left_behind
    assert second.is_live


def test_engine_killed_during_a_stream_ends_it_and_is_replaced(plane: ModalPlane) -> None:
    """The stream is interrupted, the container ends by itself, and the next request gets a fresh replica."""
    pool = pool_of(plane, "llm")
    assert pool.complete.remote("/health") == (200, {"status": "ok"})
    first = tasks_of(plane, "llm")[-1]
    engine = engine_leader(first)
    with streamed(plane, "llm", COUNTING) as answer:
        assert answer.status == 200
        assert answer.readline().startswith(b"data: {")
        engine.send_signal(signal.SIGKILL)
        with pytest.raises(http.client.IncompleteRead) as broken:
            answer.read()
    assert b"[DONE]" not in broken.value.partial
    plane.wait_until(lambda: "engine died: " in first.log, 5, "the death's report")
    assert "SIGKILL" in first.log
    plane.wait_until(lambda: first.state is TaskState.DEAD, 20, "the container's end")
    assert not first.left_behind
    answers_right(pool)
    assert tasks_of(plane, "llm")[-1] is not first


def test_preemption_during_a_stream_ends_stream_and_replica(plane: ModalPlane) -> None:
    """SIGINT with a stream in flight: Modal's runtime cuts it at once; the engine is ended, and nothing is left."""
    assert pool_of(plane, "llm").complete.remote("/health") == (200, {"status": "ok"})
    task = tasks_of(plane, "llm")[-1]
    with streamed(plane, "llm", COUNTING) as answer:
        assert answer.status == 200
        assert answer.readline().startswith(b"data: ")
        task.preempt(grace_s=30)
        with pytest.raises(http.client.IncompleteRead):
            answer.read()
    plane.wait_until(lambda: task.state is TaskState.DEAD, 29, "the replica's end, within Modal's grace")
    assert task.exit_code == 0, task.log
    assert not task.left_behind
