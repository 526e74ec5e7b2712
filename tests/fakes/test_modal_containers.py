"""Containers of the plane: start, calls, pools. The real container runtime, a sample app."""

from __future__ import annotations

import modal
import pytest

from .modal import ModalPlane
from .sample import (
    BOOT_S,
    command,
    events,
    get,
    long_call,
    names,
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


def test_variants_are_listed(shared: ModalPlane, client: modal.Client) -> None:
    """Every bound pool is listed as a variant of its class, by `modal function variants` too."""
    instance = server(client).with_options(gpu="L4")(model="listed")
    assert instance.complete.remote("/x", {})["model"] == "listed"
    done = command(shared, "function", "variants", "sample/Server.*", "--json")
    assert done.returncode == 0, done.stderr
    assert "listed" in done.stdout
    assert "L4" in done.stdout
