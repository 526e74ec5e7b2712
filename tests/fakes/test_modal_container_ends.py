"""How containers end: preempted, killed, closed, with a hook that raises, beyond a timeout."""

from __future__ import annotations

import concurrent.futures
import http.client
import os
import signal
from pathlib import Path

import modal
import pytest

from .modal import ContainerRuntime, ModalPlane, TaskState
from .sample import (
    BOOT_S,
    connection,
    deploy,
    events,
    get,
    names,
    running,
    server,
)


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
