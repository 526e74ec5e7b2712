"""The service on the control plane: the containers' engine is vLLM's CPU build in CUDA's place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modal
import psutil
import pytest

from service import engine_env
from tests.fakes.modal import ContainerRuntime, ModalPlane, client_directory

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def client_mount(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The modal client as Modal mounts it into every container."""
    return client_directory(tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="session")
def engine_runtime(client_mount: Path) -> ContainerRuntime:
    """Containers with the real engine."""
    python = engine_env.ensure(lambda _: None).python
    return ContainerRuntime(python=python, client_path=client_mount, environment={"ENGINE_DEVICE": "cpu"})


@pytest.fixture(scope="session")
def image_packages(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter with what the image installs for the service's own side, at its pins, without the engine."""
    venv = tmp_path_factory.mktemp("image") / "venv"
    names = ["aiohttp", "huggingface_hub", "pydantic", "requests"]
    lock = str(engine_env.PINS / "engine-cuda.lock")
    for arguments in (
        ["venv", str(venv)],
        ["pip", "install", "--python", str(venv / "bin/python"), "-c", lock, *names],
    ):
        subprocess.run([sys.executable, "-m", "uv", "--quiet", *arguments], check=True, timeout=120)
    return str(venv / "bin/python")


@pytest.fixture(scope="session")
def tiny_norm() -> bytes:
    """The bytes of one of the tiny model's weights, as they are in an engine's memory."""
    with (REPOSITORY / "service/assets/tiny/model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        begin, end = header["model.norm.weight"]["data_offsets"]
        file.seek(begin, os.SEEK_CUR)
        return file.read(end - begin)


@pytest.fixture
def plane(tmp_path: Path, client_mount: Path) -> Iterator[ModalPlane]:
    """A plane of the test's own, for tests that deploy and start no container."""
    with ModalPlane(tmp_path, container=ContainerRuntime(client_path=client_mount)) as plane:
        yield plane
        assert plane.failures == []
        assert plane.unknown_calls == []


def pool_of(plane: ModalPlane, model: str) -> Any:
    """Return the pool of the deployed tier that serves `model`, by whichever of its names."""
    return modal.Cls.from_name("vllm-l4", "Server", client=plane.client())(model=model)


def tasks_of(plane: ModalPlane, model: str) -> list[Any]:
    """Return the containers of that pool, oldest first."""
    return [task for task in plane.tasks if task.parameters.get("model") == model]


def engine_leader(task: Any) -> psutil.Process:
    """Return the first process of the one engine in a container."""
    members = [psutil.Process(pid) for pid in task.members() if os.getsid(pid) == pid]
    (leader,) = [member for member in members if "vllm_service.main" in member.cmdline()]
    return leader


def modal_cli(plane: ModalPlane, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the real `modal` command against the plane, in this repository."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("SERVICE_", "MODAL_"))}
    return subprocess.run(
        [sys.executable, "-m", "modal", *arguments],
        cwd=REPOSITORY,
        env={**ours, "HF_HUB_OFFLINE": "1", **plane.env, **environment},  # else it writes down commits here
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def deploy(plane: ModalPlane, **environment: str) -> subprocess.CompletedProcess[str]:
    """Deploy the service and insist that it worked without a warning."""
    done = modal_cli(plane, "deploy", "-m", "service.server", **environment)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "warning" not in said.lower(), said
    return done


def call(url: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """GET `url`, or POST a JSON body to it; return status and body, whatever the status."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310 - loopback
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
