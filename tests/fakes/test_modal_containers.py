"""Containers of the plane: start and stop, calls, scaling, failures. The real container runtime, a sample app."""

from __future__ import annotations

import concurrent.futures
import http.client
import os
import signal
import time
from pathlib import Path

import modal
import pytest

from .modal import ContainerRuntime, ModalPlane, TaskState
from .sample import (
    BOOT_S,
    command,
    connection,
    deploy,
    events,
    get,
    long_call,
    names,
    pool_of,
    running,
    server,
)


def test_run_calls_both_hooks_back_to_back(plane: ModalPlane) -> None:
    """`modal run` has no snapshot, streams logs, ends its containers with their exit hooks, leaves nothing deployed."""
    done = command(plane, "run", "-m", "sample.server", "--model", "r")
    assert done.returncode == 0, done.stderr
    assert names(plane, "r") == ["prepare", "start", "serve", "stop"]
    assert plane.snapshots.checkpoints == []
    assert '"items": [{"i": 0, "model": "r"}, {"i": 1, "model": "r"}], "one": "r"' in done.stdout
    assert '"event": "prepare"' in done.stdout
    assert plane.tasks[0].gpu == "H200:1"


def test_two_pools_share_port_8000(shared: ModalPlane) -> None:
    """Each container has its own unix socket and its own network, with the eth0 that Modal's proxy connects to."""
    url = shared.url_of("sample", "Server", "serve")
    assert get(f"{url}/health?model=port-a") == get(f"{url}/health?model=port-b") == (200, b'{"status":"ok"}')
    tasks = [task for task in shared.tasks if str(task.parameters.get("model")).startswith("port-")]
    assert len({task.namespace for task in tasks} - {None}) == 2
    assert all("No network namespace" not in task.log for task in tasks)
    assert len({event["socket"] for model in ("port-a", "port-b") for event in events(shared, model)[-1:]}) == 2


def test_query_and_python_parameters_are_one_pool(shared: ModalPlane, client: modal.Client) -> None:
    """A pool that an HTTP request has created serves Python calls with the same parameters."""
    get(f"{shared.url_of('sample', 'Server', 'serve')}/health?model=one")
    answer = server(client)(model="one").complete.remote("/p", {"x": 1})
    mine = [task for task in shared.tasks if task.parameters.get("model") == "one"]
    assert answer == {"path": "/p", "body": {"x": 1}, "model": "one", "task": mine[0].id}
    assert len(mine) == 1


def test_variant_is_a_pool_of_its_own(shared: ModalPlane, client: modal.Client) -> None:
    """`with_options` changes the GPU and replaces secrets, and streams through `remote_gen`."""
    variant = server(client).with_options(gpu="H200:2", env={"LATE": "from-options"})(model="variant")
    assert list(variant.count.remote_gen(3)) == [{"i": i, "model": "variant"} for i in range(3)]
    assert next(task for task in shared.tasks if task.parameters.get("model") == "variant").gpu == "H200:2"
    assert next(e for e in events(shared, "variant") if e["event"] == "start")["late"] == "from-options"


def test_map_and_spawn_return_in_order(client: modal.Client) -> None:
    """`.map` keeps the order of its inputs, `.spawn` gives a handle."""
    instance = server(client)(model="mapped")
    answers = list(instance.complete.map(["/m"] * 6, [{"i": i} for i in range(6)]))
    assert [answer["body"]["i"] for answer in answers] == list(range(6))
    assert instance.complete.spawn("/s", {}).get(timeout=10)["path"] == "/s"


def test_raising_method_raises_at_the_caller(client: modal.Client) -> None:
    """The caller gets the exception of a method with its type and text."""
    with pytest.raises(ValueError, match="told to fail"):
        server(client)(model="raising").fail.remote()


def test_cancelled_call_is_cancelled_in_the_container(shared: ModalPlane, client: modal.Client) -> None:
    """Cancelling a call cancels the coroutine that processes it; the container continues."""
    instance = server(client)(model="cancelled")
    call = long_call(instance)
    shared.wait_until(lambda: "working" in names(shared, "cancelled"), BOOT_S, "the call to be worked on")
    call.cancel()
    shared.wait_until(lambda: "cancelled" in names(shared, "cancelled"), BOOT_S, "the cancellation")
    with pytest.raises(modal.exception.RemoteError):
        call.get(timeout=5)
    assert instance.complete.remote("/after", {})["path"] == "/after"


def test_plain_function_is_called(client: modal.Client) -> None:
    """A function without a class can be called."""
    assert modal.Function.from_name("sample", "ping", client=client).remote("x") == "pong x"


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
    """After the scaledown window the exit hook runs, and the volume is committed a last time."""
    deploy(plane, SAMPLE_SCALEDOWN_WINDOW="3")
    url = f"{plane.url_of('sample', 'Server', 'serve')}/health?model=idle"
    get(url)
    called = time.monotonic()
    get(url)
    plane.wait_until(lambda: plane.tasks[0].state is TaskState.DEAD, BOOT_S, "the scale-down")
    assert time.monotonic() - called > 3
    assert names(plane, "idle")[-1] == "stop"
    assert plane.tasks[0].exit_code == 0
    assert "left-at-exit.txt" in plane.volumes["sample-cache"].files()


def test_autoscaler_minimum_starts_a_container(shared: ModalPlane, client: modal.Client) -> None:
    """`autoscaler.update(min_containers=1)` starts a container in a pool without calls."""
    instance = server(client)(model="warm")
    assert instance.serve.autoscaler.update(min_containers=1).min_containers == 1
    warm = lambda: [t for t in shared.tasks if t.parameters.get("model") == "warm" and t.state is TaskState.READY]  # noqa: E731
    shared.wait_until(warm, BOOT_S, "the warm container")
    assert instance.serve.autoscaler.settings().min_containers == 1


def test_preempted_container_runs_its_exit_hook_and_hands_its_input_on(plane: ModalPlane) -> None:
    """SIGINT ends the container within its grace; another one gets its inputs."""
    deploy(plane)
    instance = server(plane.client())(model="p")
    call = instance.complete.spawn("/p", {}, seconds=2.0)
    plane.wait_until(lambda: "working" in names(plane, "p"), BOOT_S, "the input to be worked on")
    plane.tasks[0].preempt(grace_s=10)
    assert call.get(timeout=BOOT_S)["path"] == "/p"
    plane.wait_until(lambda: plane.tasks[0].state is TaskState.DEAD, BOOT_S, "the preempted container's end")
    assert "stop" in [e["event"] for e in events(plane) if e["task"] == plane.tasks[0].id]
    assert len(plane.tasks) == 2


def test_preempted_container_that_stays_is_killed_after_the_grace(plane: ModalPlane) -> None:
    """A container that does not end within the grace is killed, without its exit hook."""
    deploy(plane)
    get(f"{plane.url_of('sample', 'Server', 'serve')}/health?model=stays")
    task = plane.tasks[0]
    assert task.pid is not None
    os.kill(task.pid, signal.SIGSTOP)
    task.preempt(grace_s=0.2)
    plane.wait_until(lambda: task.state is TaskState.DEAD, 5, "the kill")
    assert task.exit_code == -signal.SIGKILL
    assert "stop" not in names(plane, "stays")


def test_killed_container_fails_its_call_and_is_replaced(shared: ModalPlane, client: modal.Client) -> None:
    """An unexpected death fails the input; the next call gets a fresh container."""
    instance = server(client)(model="dies")
    with pytest.raises(modal.exception.InternalFailure, match="exited with code 7"):
        instance.die.remote()
    assert instance.complete.remote("/again", {})["path"] == "/again"


def test_raising_hook_fails_callers_with_its_exception(shared: ModalPlane, client: modal.Client) -> None:
    """A Python caller gets the exception of a hook; an HTTP client gets a 500."""
    with pytest.raises(RuntimeError, match="boom in prepare"):
        server(client)(model="fails-in-prepare").complete.remote("/x", {})
    status, body = get(f"{shared.url_of('sample', 'Server', 'serve')}/health?model=fails-in-prepare")
    assert status == 500
    assert b"boom in prepare" in body


def test_close_leaves_no_process(tmp_path: Path, runtime: ContainerRuntime) -> None:
    """Closing kills all processes of a container, those in sessions of their own too."""
    with running(tmp_path, runtime) as plane:
        deploy(plane)
        get(f"{plane.url_of('sample', 'Server', 'serve')}/health?model=o")
        helper = next(e["child"] for e in events(plane, "o") if e["event"] == "prepare")
        members = plane.tasks[0].members()
        assert helper in members
        assert len(members) == 3
    assert plane.tasks[0].members() == []


def test_input_beyond_its_timeout_fails_and_is_cancelled(shared: ModalPlane, client: modal.Client) -> None:
    """A call that exceeds its variant's timeout fails and is cancelled in the container."""
    instance = server(client).with_options(timeout=5)(model="times-out")
    with pytest.raises(modal.exception.FunctionTimeoutError, match="hit its timeout of 5s"):
        instance.complete.remote("/long", {}, seconds=50.0)
    shared.wait_until(lambda: "cancelled" in names(shared, "times-out"), BOOT_S, "the cancellation")


def test_variants_are_listed(shared: ModalPlane, client: modal.Client) -> None:
    """Every bound pool is listed as a variant of its class, by `modal function variants` too."""
    instance = server(client).with_options(gpu="L4")(model="listed")
    assert instance.complete.remote("/x", {})["model"] == "listed"
    done = command(shared, "function", "variants", "sample/Server.*", "--json")
    assert done.returncode == 0, done.stderr
    assert "listed" in done.stdout
    assert "L4" in done.stdout


def test_preemption_during_prepare_does_not_fail_the_request(plane: ModalPlane) -> None:
    """A container that is preempted while it starts is replaced, and the waiting request is answered."""
    deploy(plane)
    url = f"{plane.url_of('sample', 'Server', 'serve')}/health?model=slow-in-prepare"
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        answer = executor.submit(get, url)
        plane.wait_until(lambda: "slow" in names(plane, "slow-in-prepare"), BOOT_S, "the hook")
        plane.tasks[0].preempt(grace_s=5)
        assert answer.result(BOOT_S)[0] == 200
    assert [task.ready_at is None for task in plane.tasks] == [True, False]


def test_preemption_during_a_stream_aborts_the_connection(plane: ModalPlane) -> None:
    """The client sees an incomplete response, not the end of the stream."""
    deploy(plane)
    with connection(plane.url_of("sample", "Server", "serve")) as opened:
        opened.request("GET", "/slow?model=stream&n=100&s=0.05")
        answer = opened.getresponse()
        assert answer.read1().startswith(b"0\n")
        plane.tasks[0].preempt(grace_s=5)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            answer.read()
    plane.wait_until(lambda: plane.tasks[0].state is TaskState.DEAD, BOOT_S, "the preempted container's end")
    assert names(plane, "stream")[-1] == "stop"


def test_container_that_cannot_be_laid_out_fails_its_request(tmp_path: Path, runtime: ContainerRuntime) -> None:
    """A secret that was removed before a container starts fails the request at once and is recorded as a failure."""
    with ModalPlane(tmp_path, container=runtime) as plane:
        plane.secrets.put("sample-secret", {"TOKEN": "t"})
        deploy(plane)
        plane.secrets.remove("sample-secret")
        status, body = get(f"{plane.url_of('sample', 'Server', 'serve')}/health")
        assert (status, b"could not start container" in body) == (500, True)
        assert len(plane.failures) == 1
