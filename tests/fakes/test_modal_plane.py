"""Deploys against the plane, the plane itself, and its command: the real client, a sample app."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import modal
import pytest
from modal_proto import api_pb2 as pb

from .modal import ContainerRuntime, ContainerRuntimeError, ModalPlane, NotDeployed, PlaneTimeout, TaskState
from .modal.client_version import PINNED, why_refused
from .sample import BOOT_S, REPOSITORY, SAMPLE, command, deploy, events, get, pool_of, running, server


def test_plane_start_is_quick(tmp_path: Path, runtime: ContainerRuntime) -> None:
    """Starting and closing a plane takes less than half a second."""
    began = time.process_time()  # bench/contract.py measures wall time; here other processes run at the same time
    with ModalPlane(tmp_path, container=runtime):
        pass
    assert time.process_time() - began < 0.5


def test_deploy_sample_publishes_its_definition(shared: ModalPlane) -> None:
    """The definition on the plane has what the decorators set."""
    definition = shared.function("sample", "Server")
    assert definition.resources.gpu_config.gpu_type == "H100"
    assert definition.max_concurrent_inputs == 4
    assert definition.task_idle_timeout_secs == 60
    assert definition.checkpointing_enabled
    assert [mount.mount_path for mount in definition.volume_mounts] == ["/root/.cache/sample"]
    assert definition.method_definitions["serve"].webhook_config.web_server_port == 8000
    assert [spec.name for spec in definition.class_parameter_info.schema] == ["model", "fast_boot", "n_gpu"]
    assert shared.apps["sample"].versions == 1


def test_deploy_image_is_recorded_layer_by_layer(shared: ModalPlane) -> None:
    """Layers come base first, and ENV values survive the quoting."""
    image_id = shared.function("sample", "Server").image_id
    layers = shared.images.layers(image_id)
    install = next(i for i, layer in enumerate(layers) if "pip install" in layer and "nothing==1" in layer)
    assert install < layers.index("ENV SAMPLE_LAYER=1")
    assert shared.images.env(image_id)["SAMPLE_NOTE"] == "a b 'c'"


def test_deploy_is_quick(plane: ModalPlane) -> None:
    """The whole command is quick, the interpreter's start included; bench/contract.py has a target of three seconds."""
    began = time.monotonic()
    deploy(plane)
    assert time.monotonic() - began < 15


def test_deploy_without_its_secret_publishes_nothing(plane: ModalPlane) -> None:
    """A missing secret fails the deploy with the secret's name."""
    plane.secrets.remove("sample-secret")
    done = command(plane, "deploy", "-m", "sample.server")
    assert done.returncode == 1
    assert "Secret 'sample-secret' not found" in done.stdout + done.stderr
    with pytest.raises(NotDeployed, match="Published: "):
        plane.function("sample", "Server")


def test_deploy_with_a_secret_without_the_key_publishes_nothing(plane: ModalPlane) -> None:
    """A required key that is missing fails the deploy with the key's name."""
    plane.secrets.put("sample-secret", {"OTHER": "t"})
    done = command(plane, "deploy", "-m", "sample.server")
    assert done.returncode == 1
    assert "missing key(s): TOKEN" in done.stdout + done.stderr
    assert not plane.apps["sample"].is_deployed


def test_deploy_with_an_unknown_gpu_publishes_nothing(plane: ModalPlane) -> None:
    """A GPU that Modal does not have fails the deploy with the valid ones."""
    done = command(plane, "deploy", "-m", "sample.server", SAMPLE_GPU="H900")
    assert done.returncode == 1
    assert "Unknown GPU type 'H900'" in done.stdout + done.stderr
    assert not plane.apps["sample"].is_deployed


def test_failed_redeploy_leaves_the_version_before(plane: ModalPlane) -> None:
    """A deploy that fails leaves the previous version deployed."""
    deploy(plane)
    command(plane, "deploy", "-m", "sample.server", SAMPLE_GPU="H900")
    assert plane.function("sample", "Server").resources.gpu_config.gpu_type == "H100"
    assert plane.apps["sample"].versions == 1


def test_redeploy_keeps_the_url_and_retires_containers(plane: ModalPlane) -> None:
    """The second version has the first one's URL; the first one's container ends with its exit hook."""
    deploy(plane)
    url = plane.url_of("sample", "Server", "serve")
    assert get(f"{url}/health?model=m")[0] == 200
    deploy(plane, SAMPLE_NOTE="second")
    assert plane.url_of("sample", "Server", "serve") == url
    assert get(f"{url}/health?model=m")[0] == 200
    plane.wait_until(lambda: plane.tasks[0].state is TaskState.DEAD, BOOT_S, "the old container's end")
    assert "stop" in [e["event"] for e in events(plane) if e["task"] == plane.tasks[0].id]
    assert [e["note"] for e in events(plane, "m") if e["event"] == "start"] == ["a b 'c'", "second"]


def test_handle_from_before_a_redeploy_reaches_the_new_version(plane: ModalPlane) -> None:
    """Handles of a bound class or a variant reach the new version; their autoscaler updates are dropped."""
    deploy(plane)
    held = server(plane.client())(model="held")
    variant = server(plane.client()).with_options(gpu="L4")(model="held-on-l4")
    held.complete.autoscaler.update(min_containers=1)
    plane.wait_until(lambda: plane.tasks, BOOT_S, "the first container")
    first = plane.tasks[0]
    assert variant.complete.remote("/before", {})["model"] == "held-on-l4"
    deploy(plane, SAMPLE_NOTE="second", SAMPLE_SCALEDOWN_WINDOW="7", SAMPLE_GPU="H200")
    assert held.complete.remote("/after", {})["model"] == "held"
    assert variant.complete.remote("/after", {})["model"] == "held-on-l4"
    notes = [event["note"] for event in events(plane, "held-on-l4") if event["event"] == "start"]
    assert notes == ["a b 'c'", "second"]
    assert plane.tasks[-1].gpu == "L4:1"
    assert first.gpu == "H100:1"
    settings = held.complete.autoscaler.settings()
    assert (settings.min_containers, settings.scaledown_window) == (0, 7)


def test_unknown_call_fails_with_its_name(shared: ModalPlane) -> None:
    """A command that needs a call without a handler fails with the call's name."""
    done = command(shared, "queue", "list")
    assert done.returncode != 0
    assert "QueueList" in done.stdout + done.stderr
    assert "QueueList" in shared.unknown_calls


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("app", "list"), "sample"),
        (("volume", "list"), "sample-cache"),
        (("secret", "list"), "sample-secret"),
        (("environment", "list"), "main"),
    ],
)
def test_cli_listing_shows_existing_objects(shared: ModalPlane, arguments: tuple[str, ...], expected: str) -> None:
    """The listing commands of the CLI work."""
    done = command(shared, *arguments)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


def test_cli_container_listing_shows_the_live_one(shared: ModalPlane, client: modal.Client) -> None:
    """`modal container list` has the id of a running container."""
    assert modal.Function.from_name("sample", "ping", client=client).remote("x") == "pong x"
    done = command(shared, "container", "list", "--json")
    assert done.returncode == 0, done.stderr
    assert next(task.id for task in shared.tasks if task.tag == "ping" and task.is_live) in done.stdout


def test_transcript_names_the_caller(shared: ModalPlane, client: modal.Client) -> None:
    """The transcript distinguishes calls of the client from calls of containers."""
    assert modal.Function.from_name("sample", "ping", client=client).remote("x") == "pong x"
    callers = {call.name: call.caller for call in shared.transcript}
    assert callers["FunctionCreate"] == "client"
    assert callers["ContainerHello"].startswith("ta-")
    assert len(shared.calls("AppPublish")) == 1


def test_log_of_a_pool_has_its_containers_alone(shared: ModalPlane, client: modal.Client) -> None:
    """The app's log has those of all; a filter takes one pool by its id, or all of a class by the class's."""
    for model in ("log-a", "log-b"):
        server(client)(model=model).complete.remote("/", {})
    messages = [entry.message for entry in server(client)(model="log-a").complete.logs.tail(100)]
    assert "".join(messages) == "".join(task.log for task in shared.tasks if task.parameters.get("model") == "log-a")
    pool, log = pool_of(shared, "log-b"), shared.apps["sample"].log
    models_by_id = {one: task.parameters.get("model") for task in shared.tasks for one in (task.id, *task.former_ids)}
    for fields, models in (
        ({"function_id": pool.function.base_id}, {"log-a", "log-b"}),
        ({"function_id": pool.function.base_id, "parametrized_function_id": pool.function.id}, {"log-b"}),
        ({"parametrized_function_id": "fu-other"}, set()),
    ):
        request = pb.AppFetchLogsRequest(**fields)
        found = {models_by_id[line.task_id] for line in log.between(0, time.time()) if line.matches(request)}
        assert found & {"log-a", "log-b"} == models


def test_wait_until_in_vain_shows_the_logs(plane: ModalPlane) -> None:
    """A failed wait names what it waited for."""
    with pytest.raises(PlaneTimeout, match=r"Waited 0\.05 s in vain for a miracle"):
        plane.wait_until(lambda: False, 0.05, "a miracle")


def test_runtime_with_no_interpreter_is_refused(tmp_path: Path) -> None:
    """An interpreter for containers that does not exist is an error at once."""
    with pytest.raises(ContainerRuntimeError, match="is not a file"):
        ModalPlane(tmp_path, container=ContainerRuntime(python=tmp_path / "python"))


def test_command_prints_its_environment_and_ends_on_a_signal(tmp_path: Path) -> None:
    """`python -m tests.fakes.modal` serves until SIGTERM; a deploy with the environment that it prints works."""
    line = [sys.executable, "-m", "tests.fakes.modal", str(tmp_path / "w"), "--secret", "sample-secret:TOKEN=t"]
    with subprocess.Popen(line, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = [process.stdout.readline().removeprefix("export ").strip().partition("=") for _ in range(5)]
        environment = os.environ | {name: value for name, _, value in printed}
        deployed = subprocess.run(
            [sys.executable, "-m", "modal", "deploy", "-m", "sample.server"],
            cwd=SAMPLE,
            env=environment,
            capture_output=True,
            check=False,
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert deployed.returncode == 0


@pytest.mark.parametrize(
    ("version", "is_refused"),
    [(PINNED, False), ("1.6.99", False), ("1.6.0", True), ("1.7.0", True), ("2.0.0", True), ("", True)],
)
def test_client_version_is_the_pinned_one_or_a_newer_patch(version: str, is_refused: bool) -> None:
    """Patch releases keep the protocol; other releases are not supported."""
    assert bool(why_refused(version)) is is_refused


def test_command_with_a_newer_client_says_so_in_one_line(tmp_path: Path) -> None:
    """The error comes before the import of any private module of the client; this client has none."""
    (tmp_path / "modal").mkdir()
    (tmp_path / "modal" / "__init__.py").write_text('__version__ = "1.7.0"\n')
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    line = [sys.executable, "-m", "tests.fakes.modal", str(tmp_path / "w")]
    done = subprocess.run(line, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [why_refused("1.7.0")]
    assert f"works with {PINNED} and newer patch releases of 1.6. Install modal=={PINNED}" in done.stderr


def test_newer_client_of_another_environment_is_refused(shared: ModalPlane) -> None:
    """A client sends its version when it connects; the error has that version and the supported one."""
    newer = modal.Client(shared.url, pb.CLIENT_TYPE_CLIENT, ("ak", "as"), "1.7.0")
    newer._open()
    try:
        with pytest.raises(modal.exception.ConflictError, match=rf"found is 1\.7\.0; .* works with {PINNED}"):
            modal.Cls.from_name("sample", "Server", client=newer).hydrate()
    finally:
        newer.close()


def test_plane_works_beside_a_running_loop(tmp_path: Path, runtime: ContainerRuntime) -> None:
    """A test with an event loop of its own may use the plane too."""

    async def deployed() -> int:
        with running(tmp_path, runtime) as plane:
            done = await asyncio.to_thread(deploy, plane)
            return done.returncode

    assert asyncio.run(deployed()) == 0


def test_cli_moves_files_in_and_out_of_a_volume(plane: ModalPlane, tmp_path: Path) -> None:
    """`modal volume put`, `ls`, `get` and `rm` work on the directory of the volume."""
    content = os.urandom(9_000_000)  # more than one block
    (tmp_path / "in.bin").write_bytes(content)
    for arguments in (
        ("create", "files"),
        ("put", "files", str(tmp_path / "in.bin"), "/d/a.bin"),
        ("get", "files", "/d/a.bin", str(tmp_path / "out.bin")),
    ):
        done = command(plane, "volume", *arguments)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.bin").read_bytes() == plane.volumes["files"].read("d/a.bin") == content
    assert "d/a.bin" in command(plane, "volume", "ls", "files", "/d").stdout
    assert command(plane, "volume", "rm", "files", "/d/a.bin").returncode == 0
    assert plane.volumes["files"].files() == []


def test_cli_creates_a_proxy_token_that_web_endpoints_accept(plane: ModalPlane) -> None:
    """Web endpoints accept the token that `modal workspace proxy-tokens create` prints."""
    deploy(plane, SAMPLE_AUTH="1")
    printed = command(plane, "workspace", "proxy-tokens", "create").stdout
    bearer = next(part for part in printed.split() if part.startswith("wk-") and ".ws-" in part)
    url = f"{plane.url_of('sample', 'Server', 'serve')}/health"
    assert get(url, {"Authorization": f"Bearer {bearer}"})[0] == 200


def test_large_file_of_a_package_is_laid_out(plane: ModalPlane, tmp_path: Path) -> None:
    """Files that are uploaded as blobs arrive whole in the container's directory."""
    shutil.copytree(SAMPLE / "sample", tmp_path / "app" / "sample")
    content = os.urandom(5_000_000)
    (tmp_path / "app" / "sample" / "weights.bin").write_bytes(content)
    line = [sys.executable, "-m", "modal", "deploy", "-m", "sample.server"]
    subprocess.run(line, cwd=tmp_path / "app", env=os.environ | plane.env, check=True, capture_output=True)
    get(f"{plane.url_of('sample', 'Server', 'serve')}/health")
    assert (plane.tasks[0].root / "sample" / "weights.bin").read_bytes() == content
