"""One replica's life in the real container entrypoint and engine: prepare, checkpoint, start, serve, stop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import modal
import psutil
import pytest

from tests.contract.conftest import call, deploy, modal_cli
from tests.engine.dialogues import QUESTION
from tests.fakes.modal import ContainerRuntime, ModalPlane, TaskState

BOOT_S = 150


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, engine_runtime: ContainerRuntime) -> Iterator[ModalPlane]:
    """A plane with the tiny model's tier deployed and the real engine in its containers."""
    with ModalPlane(tmp_path_factory.mktemp("plane"), container=engine_runtime) as plane:
        deploy(plane, SERVICE_MODEL="tiny")
        yield plane
        assert plane.failures == []
        assert plane.unknown_calls == []


def _words(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


def test_replica_serves_over_http_after_a_checkpoint_and_stops_clean(tiny: ModalPlane) -> None:
    """A request with a proxy token boots a replica through its checkpoint and is answered; preemption ends it clean."""
    held: list[tuple[bool, list[Any]]] = []
    tiny.snapshots.before_restore.append(lambda task: held.append(_engine_at_rest(task)))
    token = tiny.proxy_tokens.create()
    url = tiny.url_of("vllm-l4", "Server", "serve")
    assert call(f"{url}/health?model=tiny")[0] == 401, "a stranger is refused"
    assert not tiny.tasks, "and starts no container"

    status, body = call(f"{url}/v1/chat/completions?model=tiny", {"model": "tiny", **QUESTION}, token.headers)

    task = tiny.tasks[-1]
    assert status == 200, body + task.log.encode()
    assert "Paris" in _words(json.loads(body))
    assert task.restored, "prepare ended in a checkpoint, and start came after the restore"
    assert held == [(True, [])], "at the checkpoint the engine's program was running, with no socket open"
    assert '"outcome": "ready"' in task.log, "the boot's record"
    members = task.members()
    task.preempt(grace_s=30)
    tiny.wait_until(lambda: task.state is TaskState.DEAD, 40, "the replica's end")
    assert task.exit_code == 0, task.log
    assert "Application shutdown complete" in task.log, "the engine was let end by itself"
    assert members
    assert not task.left_behind


def _engine_at_rest(task: Any) -> tuple[bool, list[Any]]:
    """Return whether the engine's program runs in a container, and the internet sockets that it holds."""
    processes = [psutil.Process(pid) for pid in task.members()]
    engines = [process for process in processes if "vllm_service.main" in process.cmdline()]
    links = [str(fd.readlink()) for engine in engines for fd in Path(f"/proc/{engine.pid}/fd").iterdir()]
    return bool(engines), [link for link in links if link.startswith("socket:")]


def test_variant_on_another_gpu_answers_complete(tiny: ModalPlane) -> None:
    """`Server.with_options(gpu="H200")(model=…)` is a pool of its own, and `complete` reaches its engine."""
    server = modal.Cls.from_name("vllm-l4", "Server", client=tiny.client())
    pool = server.with_options(gpu="H200", scaledown_window=120)(model="tiny")

    status, answer = pool.complete.remote("/v1/chat/completions", {"model": "llm", **QUESTION})
    assert status == 200, answer
    assert "Paris" in _words(answer)
    assert pool.complete.remote("/health") == (200, {"status": "ok"})
    status, answer = pool.complete.remote("/invocations", {"model": "llm", **QUESTION})
    assert status == 404
    assert "/invocations" in answer["error"]["message"]
    assert tiny.tasks[-1].gpu == "H200:1"


def test_two_parameter_sets_at_once_are_two_replicas(tiny: ModalPlane) -> None:
    """Requests for two parameter sets at the same time boot two containers, each with its own engine on port 8000."""
    token = tiny.proxy_tokens.create()
    url = tiny.url_of("vllm-l4", "Server", "serve")
    models = ("llm", "Tiny")
    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(call, f"{url}/v1/models?model={name}", headers=token.headers) for name in models]
        answers = [future.result() for future in asked]
    assert [status for status, _ in answers] == [200, 200]
    tasks = {task.parameters["model"]: task for task in tiny.tasks if task.parameters["model"] in models}
    assert len({task.id for task in tasks.values()}) == 2


def test_container_with_only_the_images_packages_imports_the_service(
    tmp_path: Path, client_mount: Path, image_packages: str
) -> None:
    """What the container imports is in the image: with its pins but no vLLM, only the engine's program is missing."""
    with ModalPlane(tmp_path, container=ContainerRuntime(python=image_packages, client_path=client_mount)) as plane:
        deploy(plane, SERVICE_MODEL="tiny")
        pool = modal.Cls.from_name("vllm-l4", "Server", client=plane.client())(model="tiny")
        with pytest.raises(Exception, match="No module named 'torch'"):
            pool.complete.remote("/health")


def test_replica_with_too_few_gpus_fails_with_the_counts(tmp_path: Path, client_mount: Path) -> None:
    """`n_gpu` over what the container shows ends the boot with both counts and the remedy."""
    runtime = ContainerRuntime(client_path=client_mount)
    with ModalPlane(tmp_path, container=runtime) as plane:
        deploy(plane, SERVICE_MODEL="tiny", SERVICE_SNAPSHOT="off")
        pool = modal.Cls.from_name("vllm-l4", "Server", client=plane.client())(model="tiny", n_gpu=2)
        with pytest.raises(Exception, match="n_gpu=2 GPUs and 1 are visible"):
            pool.complete.remote("/health")


def test_modal_run_holds_two_conversations(tmp_path: Path, engine_runtime: ContainerRuntime) -> None:
    """`modal run -m service.server` checks health and prints what the pirate and Jar Jar say."""
    with ModalPlane(tmp_path, container=engine_runtime) as plane:
        done = modal_cli(plane, "run", "-m", "service.server", SERVICE_MODEL="tiny")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Healthy" in done.stdout
        assert done.stdout.count("Sending to llm") == 2
        assert "Jar Jar" in done.stdout
        assert plane.snapshots.checkpoints == [], "an ephemeral app has none: both hooks run back to back"
        assert not [task for task in plane.tasks if task.state is not TaskState.DEAD]
        assert plane.failures == []
