"""How many containers a pool has: concurrency, the autoscaler, idle ones."""

from __future__ import annotations

import time

import modal
import pytest

from .modal import ModalPlane, TaskState
from .sample import (
    BOOT_S,
    deploy,
    events,
    get,
    long_call,
    names,
    pool_of,
    server,
)


def test_inputs_beyond_concurrency_start_a_second_container(shared: ModalPlane, client: modal.Client) -> None:
    """Ten inputs at four per container start two containers, the maximum."""
    instance = server(client)(model="many")
    answers = list(instance.complete.map(["/x"] * 10, [{}] * 10, kwargs={"seconds": 3.0}))
    assert len({answer["task"] for answer in answers}) == 2
    assert len([task for task in shared.tasks if task.parameters.get("model") == "many"]) == 2


def test_concurrency_of_a_variant_is_its_own(shared: ModalPlane, client: modal.Client) -> None:
    """`with_concurrency` sets the inputs per container of the variant; the class keeps its four."""
    cls = server(client)
    one, ten = (cls.with_concurrency(max_inputs=most)(model="concurrency") for most in (1, 10))
    calls = [long_call(one) for _ in range(2)] + [long_call(ten) for _ in range(8)]
    pools = [pool for pool in shared.pools if pool.parameters.get("model") == "concurrency"]
    spread = lambda: [[len(task.inputs) for task in pool.tasks] for pool in pools] == [[1, 1], [8]]  # noqa: E731
    shared.wait_until(spread, BOOT_S, "two containers with one input, and one with eight")
    for call in calls:
        call.cancel()
    assert [pool.concurrency for pool in pools] == [1, 10]
    assert shared.function("sample", "Server").max_concurrent_inputs == 4


def test_options_of_a_variant_reach_its_pool(shared: ModalPlane, client: modal.Client) -> None:
    """The pool's autoscaler has the variant's limits, and the variant's region is recorded."""
    limits = {"scaledown_window": 7, "max_containers": 1, "buffer_containers": 3}
    places = {"region": "us", "cloud": "aws", "routing_region": "us-east"}
    variant = server(client).with_options(**limits, **places)(model="optional")
    settings = variant.serve.autoscaler.settings()
    assert {name: getattr(settings, name) for name in limits} == limits
    definition = pool_of(shared, "optional").function.definition
    assert definition.scheduler_placement.regions == ["us"]
    assert (definition.cloud_provider_str, definition.routing_region) == ("aws", "us-east")


def test_option_that_the_plane_does_not_apply_is_refused(client: modal.Client) -> None:
    """An option that the plane does not support is an error with its name."""
    bucket = modal.CloudBucketMount("bucket")
    variant = server(client).with_options(volumes={"/bucket": bucket})(model="bucket")
    with pytest.raises(modal.exception.UnimplementedError, match="cloud_bucket_mounts"):
        variant.serve.autoscaler.settings()


def test_autoscaler_limits_and_releases_a_pool(shared: ModalPlane, client: modal.Client) -> None:
    """Inputs beyond the maximum wait; a killed container is replaced up to the minimum; an idle one above it stops."""
    instance = server(client)(model="scaled")
    autoscaler = instance.serve.autoscaler
    autoscaler.update(min_containers=1, max_containers=1)
    calls, pool = [long_call(instance) for _ in range(6)], pool_of(shared, "scaled")
    shared.wait_until(lambda: [len(task.inputs) for task in pool.tasks] == [4], BOOT_S, "as many inputs as it takes")
    assert pool.queued == 2
    for call in calls:
        call.cancel()
    shared.wait_until(lambda: not pool.queued and not pool.tasks[0].inputs, BOOT_S, "the cancellations")
    pool.tasks[0].kill()
    back = lambda: [task.state for task in pool.tasks] == [TaskState.DEAD, TaskState.READY]  # noqa: E731
    shared.wait_until(back, BOOT_S, "another container")
    autoscaler.update(min_containers=0, scaledown_window=2)
    shared.wait_until(lambda: pool.tasks[1].state is TaskState.DEAD, BOOT_S, "the scale-down")
    assert (pool.tasks[1].exit_code, len(pool.tasks)) == (0, 2)


def test_idle_container_stops_after_the_window(plane: ModalPlane) -> None:
    """After the scaledown window the exit hook runs, and the volume is committed a last time; what stays is named."""
    deploy(plane, SAMPLE_SCALEDOWN_WINDOW="3")
    url = f"{plane.url_of('sample', 'Server', 'serve')}/health?model=leaves-a-process"
    get(url)
    called = time.monotonic()
    get(url)
    plane.wait_until(lambda: plane.tasks[0].state is TaskState.DEAD, BOOT_S, "the scale-down")
    assert time.monotonic() - called > 3
    assert names(plane, "leaves-a-process")[-1] == "stop"
    assert plane.tasks[0].exit_code == 0
    assert plane.tasks[0].left_behind == [next(e["child"] for e in events(plane) if e["event"] == "prepare")]
    assert "left-at-exit.txt" in plane.volumes["sample-cache"].files()


def test_autoscaler_minimum_starts_a_container(shared: ModalPlane, client: modal.Client) -> None:
    """`autoscaler.update(min_containers=1)` starts a container in a pool without calls."""
    instance = server(client)(model="warm")
    assert instance.serve.autoscaler.update(min_containers=1).min_containers == 1
    warm = lambda: [t for t in shared.tasks if t.parameters.get("model") == "warm" and t.state is TaskState.READY]  # noqa: E731
    shared.wait_until(warm, BOOT_S, "the warm container")
    assert instance.serve.autoscaler.settings().min_containers == 1
