"""`vllm-service prefetch --modal`: a function without a GPU fills the volume once, and replicas boot from it.

The real client and the real container runtime on the control plane, the real hub client against a hub on loopback.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import modal
import pytest

from service.modal_app.leases import LOCKS
from service.modal_app.prefetch import APP
from tests import preloaded
from tests.contract.conftest import REPOSITORY, deploy
from tests.fakes.hub import Fault, Hub, Repository, serving
from tests.fakes.modal import ContainerRuntime, ModalPlane, TaskState

COMMAND = str(Path(sys.executable).with_name("vllm-service"))
TINY = REPOSITORY / "service/assets/tiny"
FILES = {file.name: file.read_bytes() for file in TINY.iterdir()}
PINNED, NEWEST = "a" * 40, "b" * 40
EXPIRY_S = 8  # of a dead holder's lease; 60 outside the tests

MODELS = f"""
[models.pinned]
hub_id = "me/pinned"
revision = "{PINNED}"
gpu = "L4"
max_model_len = 2048
weights_gb = 0.004

[models.loose]
hub_id = "me/loose"
gpu = "L4"
max_model_len = 2048
weights_gb = 0.004

[models.shut]
hub_id = "me/shut"
revision = "{PINNED}"
gated = true
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub with models that are the tiny one."""
    repositories = {
        "me/pinned": Repository(PINNED, dict(FILES)),
        "me/loose": Repository(NEWEST, dict(FILES)),
        "me/shut": Repository(PINNED, dict(FILES), gated="files"),
    }
    with serving(Hub(repositories=repositories)) as hub:
        yield hub
    assert hub.unknown == []


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The user's models file."""
    file = tmp_path / "my-models.toml"
    file.write_text(MODELS)
    return file


@pytest.fixture
def plane(tmp_path: Path, client_mount: Path, image_packages: str, hub: Hub) -> Iterator[ModalPlane]:
    """A plane whose containers have what the prefetch's image has, and reach the hub."""
    with ModalPlane(tmp_path / "plane", container=_runtime(image_packages, client_mount, hub)) as plane:
        yield plane
        assert plane.failures == []
        assert plane.unknown_calls == []


def _runtime(python: str, client_mount: Path, hub: Hub, **environment: str) -> ContainerRuntime:
    reach = {"HF_ENDPOINT": hub.url, "LEASE_EXPIRY_S": str(EXPIRY_S), **environment}
    port = urlsplit(hub.url).port or 0
    return ContainerRuntime(python=python, client_path=client_mount, environment=reach, host_ports=(port,))


def started(
    plane: ModalPlane,
    models: Path,
    *arguments: str,
    stderr: int = subprocess.PIPE,
    command: Sequence[str] = (COMMAND,),
    **environment: str,
) -> subprocess.Popen[str]:
    """Start the command with an account of the control plane and without access to the hub."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("SERVICE_", "MODAL_", "HF_"))}
    ours |= {"SERVICE_MODELS_FILE": str(models), "HF_ENDPOINT": "http://127.0.0.1:9", **plane.env, **environment}
    line = [*command, "prefetch", "--modal", *arguments]
    return subprocess.Popen(line, env=ours | preloaded.environment(), stdout=subprocess.PIPE, stderr=stderr, text=True)


def prefetched(
    plane: ModalPlane, models: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    command = (preloaded.python(), "vllm-service")
    with started(plane, models, *arguments, command=command, **environment) as process:
        out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def downloads(hub: Hub) -> list[str]:
    """Return the names of the files that the hub was asked to send."""
    return [line.rpartition("/")[2] for line in hub.requests if line.startswith("GET ") and "/resolve/" in line]


def askers(plane: ModalPlane) -> set[str]:
    """Return the containers that wanted the lock."""
    return {call.caller for call in plane.transcript if call.name == "DictUpdate"}


def test_prefetch_fills_the_committed_volume_without_a_gpu(plane: ModalPlane, models: Path, hub: Hub) -> None:
    """The function has no GPU, reports its progress here, and commits; a second run finds everything complete."""
    done = prefetched(plane, models, "pinned")

    assert done.returncode == 0, done.stderr
    assert f"pinned: me/pinned at {PINNED} is complete" in done.stdout
    assert "Fetching me/pinned" in done.stderr
    volume = plane.volumes["huggingface-cache"]
    for name, content in FILES.items():
        assert volume.read(f"hub/models--me--pinned/snapshots/{PINNED}/{name}") == content
    function = plane.function(APP, "fetch")
    assert not function.resources.gpu_config.gpu_type
    assert [mount.mount_path for mount in function.volume_mounts] == ["/root/.cache/huggingface"]
    assert function.timeout_secs == 24 * 3600
    assert list(function.secret_ids) == []
    assert plane.dicts[LOCKS].keys() == [], "the lock was given back"

    asked = len(downloads(hub))
    again = prefetched(plane, models, "pinned", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["models"][0]["fetched"] is False
    assert len(downloads(hub)) == asked


def test_prefetch_with_a_volume_prefix_fills_that_volume(plane: ModalPlane, models: Path) -> None:
    """The one that a deploy with the same setting mounts; its leases are its own too."""
    plane.dicts.put(LOCKS)["me/pinned"] = ("a container of another deployment", 3)
    done = prefetched(plane, models, "pinned", SERVICE_VOLUME_PREFIX="team-")

    assert done.returncode == 0, done.stderr
    assert "Another container" not in done.stderr
    assert plane.dicts[f"team-{LOCKS}"].keys() == []
    assert [volume.name for volume in plane.volumes] == ["team-huggingface-cache"]
    files = plane.volumes["team-huggingface-cache"].files()
    assert f"hub/models--me--pinned/snapshots/{PINNED}/config.json" in files


def test_prefetch_of_an_entry_without_a_revision_records_the_commit(plane: ModalPlane, models: Path, hub: Hub) -> None:
    """The container asks the hub; the lock file here and the record on the volume then have the same commit."""
    done = prefetched(plane, models, "loose")
    lock = models.with_name("my-models.lock.toml")
    assert f"me/loose is at {NEWEST}, recorded in {lock}" in done.stderr
    assert f'"me/loose" = "{NEWEST}"' in lock.read_text()
    assert f'"me/loose" = "{NEWEST}"'.encode() in plane.volumes["huggingface-cache"].read("vllm-service.revisions.toml")

    hub.repositories["me/loose"] = Repository(PINNED, dict(FILES))
    lock.unlink()
    assert f"loose: me/loose at {NEWEST} is complete" in prefetched(plane, models, "loose").stdout
    updated = prefetched(plane, models, "loose", "--update")
    assert f"loose: me/loose at {PINNED} is complete" in updated.stdout, updated.stderr
    assert f'"me/loose" = "{PINNED}"' in lock.read_text()
    record = plane.volumes["huggingface-cache"].read("vllm-service.revisions.toml")
    assert f'"me/loose" = "{NEWEST}"'.encode() in record, "what is deployed goes on with what it serves"


def test_prefetch_verify_names_what_is_damaged_and_prefetch_repairs_it(plane: ModalPlane, models: Path) -> None:
    """A flipped byte in the volume is reported with the file's name, and the file fetched again."""
    assert prefetched(plane, models, "pinned").returncode == 0
    volume = plane.volumes["huggingface-cache"]
    blob = (volume.path / f"hub/models--me--pinned/snapshots/{PINNED}/model.safetensors").resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(content)

    found = prefetched(plane, models, "pinned", "--verify")
    assert found.returncode == 1
    assert "model.safetensors of me/pinned is damaged" in found.stdout
    error, hint = found.stderr.splitlines()[-2:]
    assert error == "error: Damaged or missing: 1 of the files of pinned."
    assert hint == "hint: Fetch them again: vllm-service prefetch --modal pinned"
    assert prefetched(plane, models, "pinned").returncode == 0
    assert prefetched(plane, models, "pinned", "--verify").returncode == 0


def test_prefetch_prune_removes_what_no_entry_names(plane: ModalPlane, models: Path) -> None:
    """A revision that an entry named once is removed from the volume; what is named stays."""
    assert prefetched(plane, models, "pinned", "loose").returncode == 0
    models.write_text(MODELS.replace("me/pinned", "me/other"))
    done = prefetched(plane, models, "--prune")

    assert done.returncode == 0, done.stderr
    assert f"removed me/pinned at {PINNED}" in done.stdout
    files = plane.volumes["huggingface-cache"].files()
    assert not [file for file in files if "me--pinned/snapshots" in file or "me--pinned/blobs" in file]
    assert [file for file in files if f"me--loose/snapshots/{NEWEST}" in file]


def test_prefetch_of_a_gated_model_needs_the_secret(plane: ModalPlane, models: Path, hub: Hub) -> None:
    """Without it the hint says how to create it, with it the model is fetched; the token is never printed."""
    refused = prefetched(plane, models, "shut")
    assert (refused.returncode, refused.stdout) == (1, "")
    error, hint = refused.stderr.splitlines()
    assert error.startswith("error: A gated model needs Modal's secret 'huggingface'")
    assert hint.startswith("hint: Create it: modal secret create huggingface HF_TOKEN=<token>.")

    plane.secrets.put("huggingface", {"HF_TOKEN": "hf_wrong"})
    wrong = prefetched(plane, models, "shut")
    assert wrong.returncode == 1
    error, hint = wrong.stderr.splitlines()[-2:]
    assert (error[:7], hint[:6]) == ("error: ", "hint: ")
    assert "hf_wrong" not in wrong.stdout + wrong.stderr

    plane.secrets.put("huggingface", {"HF_TOKEN": hub.token})
    done = prefetched(plane, models, "shut")
    assert done.returncode == 0, done.stderr
    assert len(plane.function(APP, "fetch").secret_ids) == 1


def test_prefetch_of_what_is_in_no_registry_is_refused_before_modal_is_asked(plane: ModalPlane, models: Path) -> None:
    """A deployed service could not serve it."""
    done = prefetched(plane, models, "me/unheard-of")
    assert done.returncode == 2
    assert "Unknown model 'me/unheard-of'" in done.stderr
    assert list(plane.apps) == []


def test_prefetch_in_an_environment_that_is_not_there_is_refused(plane: ModalPlane, models: Path) -> None:
    """`--env` chooses Modal's environment, before its client is imported."""
    done = prefetched(plane, models, "pinned", "--env", "nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert "'nowhere' not found" in done.stderr


def test_prefetches_at_once_download_once(plane: ModalPlane, models: Path, hub: Hub) -> None:
    """The second container waits for the first, and then finds in the volume what that one committed."""
    hub.may_send_files.clear()
    with started(plane, models, "pinned") as first, started(plane, models, "pinned") as second:
        assert hub.files_requested.wait(60)
        plane.wait_until(lambda: len(askers(plane)) == 2, 60, "the second one's look at the lock")
        hub.may_send_files.set()
        outputs = [process.communicate(timeout=120) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], outputs
    assert sorted(set(downloads(hub))) == sorted(downloads(hub)), "nothing was sent twice"
    said = [err for _, err in outputs]
    assert sum("Another container holds me/pinned" in err for err in said) == 1
    assert sum("Fetching me/pinned" in err for err in said) == 1


def test_prefetch_continues_after_the_lease_of_a_dead_holder_expired(plane: ModalPlane, models: Path) -> None:
    """A container that was killed releases nothing: its lease expires."""
    plane.dicts.put(LOCKS)["me/pinned"] = ("somebody who died", 3)
    began = time.monotonic()
    done = prefetched(plane, models, "pinned")

    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began > EXPIRY_S
    assert "The holder of me/pinned has not renewed its lease for " in done.stderr
    assert "me/pinned" not in plane.dicts[LOCKS]


def test_prefetch_interrupted_keeps_what_was_finished(plane: ModalPlane, models: Path, hub: Hub) -> None:
    """Ctrl-C ends command and container; the model that was complete is in the volume."""
    hub.faults.append(Fault("GET /me/pinned/resolve/", times=-1, stalls=True))
    with started(plane, models, "loose", "pinned") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("loose: me/loose")
        plane.wait_until(lambda: any("/me/pinned/resolve/" in line for line in hub.requests), 30, "the second model")
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert time.monotonic() - began < 15
    assert err.splitlines()[-1] == "Stopped. What was finished is kept; the same command goes on from there."
    hub.faults.clear()
    plane.wait_until(lambda: all(task.state is TaskState.DEAD for task in plane.tasks), 20, "the container's end")
    assert not plane.tasks[0].left_behind
    manifest = f"hub/models--me--loose/vllm-service/{NEWEST}.json"
    assert manifest in plane.volumes["huggingface-cache"].files()
    assert prefetched(plane, models, "loose", "pinned").returncode == 0
    assert hub.requests.count(f"GET /me/loose/resolve/{NEWEST}/config.json") == 1


def test_prefetch_interrupted_while_it_prints_ends_command_and_container(
    plane: ModalPlane, models: Path, hub: Hub
) -> None:
    """Ctrl-C between two events, with a terminal that takes nothing at the moment."""
    hub.faults.append(Fault("GET /me/pinned/resolve/", times=-1, stalls=True))
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(1))
    os.set_blocking(writing, True)
    with started(plane, models, "pinned", stderr=writing) as process:
        os.close(writing)
        in_write = Path(f"/proc/{process.pid}/syscall")
        plane.wait_until(lambda: in_write.read_text().split()[1:2] == ["0x2"], 30, "a line that waits for the terminal")
        process.send_signal(signal.SIGINT)
        with os.fdopen(reading, errors="replace") as terminal:
            err = terminal.read()
        assert process.wait(15) == 130
    assert err.splitlines()[-1] == "Stopped. What was finished is kept; the same command goes on from there."
    plane.wait_until(lambda: all(task.state is TaskState.DEAD for task in plane.tasks), 20, "the container's end")


def test_prefetch_without_an_account_says_how_to_get_one(models: Path, tmp_path: Path) -> None:
    """An error and a hint, no traceback."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("SERVICE_", "MODAL_", "HF_"))}
    ours |= {"SERVICE_MODELS_FILE": str(models), "MODAL_CONFIG_PATH": str(tmp_path / "none.toml")}
    line = [COMMAND, "prefetch", "--modal", "pinned"]
    done = subprocess.run(line, env=ours, capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 2)
    assert done.stderr.splitlines()[1].startswith("hint: Run 'modal setup'")


def test_replicas_boot_from_what_was_prefetched_with_the_hub_gone(
    tmp_path: Path, engine_runtime: ContainerRuntime, client_mount: Path, hub: Hub, models: Path
) -> None:
    """The lock file travels with the deploy: a replica serves the recorded commit, and asks no hub."""
    runtime = _runtime(str(engine_runtime.python), client_mount, hub, **engine_runtime.environment)
    with ModalPlane(tmp_path / "plane", container=runtime) as plane:
        assert prefetched(plane, models, "loose").returncode == 0
        deploy(plane, SERVICE_MODEL="loose", SERVICE_MODELS_FILE=str(models), HF_ENDPOINT="http://127.0.0.1:9")
        uploaded = [file.filename for mount in plane.calls("MountGetOrCreate") for file in mount.files]
        assert "/root/service-models.lock.toml" in uploaded
        hub.repositories.clear()
        before = len(hub.requests)
        pool: Any = modal.Cls.from_name("vllm-l4", "Server", client=plane.client())(model="loose")
        assert pool.complete.remote("/health") == (200, {"status": "ok"})

        assert hub.requests[before:] == []
        assert f'"revision": "{NEWEST}"' in plane.tasks[-1].log
        assert plane.failures == []
