"""Without snapshots, on Modal's real entrypoint: the phases of a boot, and an engine that hangs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contract.conftest import answers_right, call, deployed, engine_leader, pool_of, record_of, tasks_of
from tests.engine.running import BOOT_S
from tests.fakes.modal import ContainerRuntime, ModalPlane, TaskState


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, engine_runtime: ContainerRuntime) -> Iterator[ModalPlane]:
    """A plane with the tier deployed without snapshots, whose engines are replaced after a short hang."""
    settings = {"SERVICE_SNAPSHOT": "off", "SERVICE_HANG_S": "10"}
    with deployed(tmp_path_factory.mktemp("plain"), engine_runtime, **settings) as plane:
        yield plane
        assert plane.snapshots.checkpoints == []


def test_preemption_of_a_loading_engine_leaves_nothing(plain: ModalPlane) -> None:
    """SIGINT while the engine comes up in `start`: it is ended at once, and another replica serves the request.

    That one's record has what both hooks did, in order.
    """
    pool = pool_of(plain, "TINY")
    running = pool.complete.spawn("/health")
    plain.wait_until(lambda: any("(EngineCore" in t.log for t in tasks_of(plain, "TINY")), 60, "the engine to load")
    (first,) = tasks_of(plain, "TINY")
    first.preempt(grace_s=10)
    plain.wait_until(lambda: first.state is TaskState.DEAD, 12, "the container's end")
    assert not first.left_behind
    assert first.exit_code == 0, "it was not killed"
    assert record_of(first).outcome == "failed"
    assert running.get(timeout=BOOT_S) == (200, {"status": "ok"})
    record = record_of(tasks_of(plain, "TINY")[-1])
    assert (record.strategy, record.outcome, record.restored) == ("off", "ready", False)
    names = [span.name for span in record.phases if span.name != "caches"]  # which are taken in while it imports
    assert list(dict.fromkeys(names)) == ["weights", "import", "load", "canary", "ready"]
    assert record.phases[0].start >= 0, "nothing was paid for by an earlier replica"


def test_engine_that_hangs_after_ready_is_replaced(plain: ModalPlane) -> None:
    """`/health` stays green while the engine generates no token: the watchdog notices, and the replica is replaced."""
    pool = pool_of(plain, "TINY")
    answers_right(pool)
    first = tasks_of(plain, "TINY")[-1]
    for core in engine_leader(first).children(recursive=True):
        core.suspend()
    token = plain.proxy_tokens.create()
    url = plain.url_of("vllm-l4", "Server", "serve")
    assert call(f"{url}/health?model=TINY", headers=token.headers)[0] == 200
    plain.wait_until(lambda: "engine died: The engine hung" in first.log, 60, "the hang's report")
    assert f"boot {record_of(first).id}: engine died" in first.log
    plain.wait_until(lambda: first.state is TaskState.DEAD, 20, "the container's end")
    assert not first.left_behind
    answers_right(pool)
