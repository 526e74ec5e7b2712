"""The service on the control plane: the containers' engine is vLLM's CPU build in CUDA's place."""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import modal
import psutil
import pytest

from service.boots.records import BootRecord
from service.engine import environment as engine_environment
from tests import preloaded
from tests.engine.dialogues import QUESTION
from tests.engine.running import BOOT_S, ONE_THREAD, requests_running
from tests.fakes.hub import Hub
from tests.fakes.modal import ContainerRuntime, ModalPlane, client_directory

REPOSITORY = Path(__file__).parents[2]
CHAT = "/v1/chat/completions"
UV = [sys.executable, "-m", "uv", "--quiet"]
IMPORTED_BY_THE_GATEWAY = ("starlette.routing", "pydantic", "msgspec", "httpx2", "anyio", "prometheus_client")


@pytest.fixture(scope="session")
def client_mount(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The modal client as Modal mounts it into every container."""
    return client_directory(tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="session")
def engine_runtime(tmp_path_factory: pytest.TempPathFactory) -> ContainerRuntime:
    """Containers with the real engine, in which the gateway runs too: its own image has a package more."""
    return runtime_with_engine(tmp_path_factory.mktemp("client-and-gateway"))


def runtime_with_engine(directory: Path) -> ContainerRuntime:
    """Return containers with the real engine and all that the gateway imports; `directory` is for Modal's client."""
    python = engine_environment.ensure().python
    mount = client_directory(directory)
    if decoders := importlib.util.find_spec("backports"):  # a part of Python from 3.14 on
        (mount / "backports").symlink_to(next(iter(decoders.submodule_search_locations or ())))
    imported = preloaded.serve(str(python), *preloaded.CONTAINER, *IMPORTED_BY_THE_GATEWAY, path=str(mount))
    environment = {"ENGINE_DEVICE": "cpu", **ONE_THREAD}
    return ContainerRuntime(python=python, client_path=mount, environment=environment, preloaded=imported)


def reaching(runtime: ContainerRuntime, hub: Hub) -> ContainerRuntime:
    """Return such containers with a way to a hub of the test."""
    ports, environment = (urlsplit(hub.url).port or 0,), {**runtime.environment, "HF_ENDPOINT": hub.url}
    return replace(runtime, environment=environment, host_ports=ports)


@pytest.fixture(scope="session")
def image_packages(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter with what the image installs for the service's own side, by the lock's own lines, no engine.

    That is what the lock was made of, less the engine, and all that this requires. A name that the lock has not fails.
    """
    directory = tmp_path_factory.mktemp("image")
    chosen = directory / "chosen.txt"
    lock = engine_environment.PINS / "engine-cuda.lock"
    locked: dict[str, str] = {}
    for requirement in re.split(r"\n(?=\w)", lock.read_text()):
        name = requirement.partition("==")[0]
        locked[name] = f"{locked.get(name, '')}{requirement}\n"  # some have a version for each Python
    wanted = (engine_environment.PINS / "engine-cuda.in").read_text().splitlines()
    own = "\n".join(name for name in wanted if not name.startswith(("vllm", "torch", "flashinfer")))
    compiling = ["pip", "compile", "--no-header", "--no-annotate", "--python", sys.executable, "-c", str(lock), "-"]
    done = subprocess.run([*UV, *compiling], input=own, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    names = [line.partition("==")[0] for line in done.stdout.splitlines()]
    assert [name for name in names if name not in locked] == [], "required by the service, and not in the image"
    chosen.write_text("".join(locked[name] for name in names))
    return installed(chosen, directory / "venv")


def installed(lock: Path, venv: Path) -> str:
    """Make an environment of what a lock names, and nothing else; return its interpreter."""
    python = str(venv / "bin/python")
    for arguments in (
        ["venv", "--python", sys.executable, str(venv)],
        ["pip", "install", "--python", python, "--require-hashes", "--no-deps", "-r", str(lock)],
    ):
        subprocess.run([*UV, *arguments], check=True, timeout=120)
    return python


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
    imported = preloaded.serve(sys.executable, *preloaded.CONTAINER)
    with ModalPlane(tmp_path, container=ContainerRuntime(client_path=client_mount, preloaded=imported)) as plane:
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


def record_of(task: Any) -> BootRecord:
    """Return the record of a container's latest boot from its log."""
    lines = [line for line in task.log.splitlines() if line.startswith("boot {")]
    return BootRecord.from_line(lines[-1].removeprefix("boot "))


def answers_right(pool: Any, model: str = "llm") -> None:
    """Ask a pool through `complete`, and insist on what the tiny model remembers."""
    status, answer = pool.complete.remote(CHAT, {"model": model, **QUESTION})
    assert status == 200, answer
    assert "Paris" in answer["choices"][0]["message"]["content"]


def modal_cli(plane: ModalPlane, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the real `modal` command against the plane, in this repository."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("SERVICE_", "MODAL_"))}
    return subprocess.run(
        [preloaded.python(), "-m", "modal", *arguments],
        cwd=REPOSITORY,
        env={**ours, **preloaded.environment(), **plane.env, **environment},
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


@contextmanager
def deployed(directory: Path, runtime: ContainerRuntime, **environment: str) -> Iterator[ModalPlane]:
    """A plane with the tiny model's tier deployed; at the end nothing on it failed or was unknown."""
    with ModalPlane(directory, container=runtime) as plane:
        deploy(plane, SERVICE_MODEL="tiny", **environment)
        yield plane
        assert plane.failures == []
        assert plane.unknown_calls == []


def generating(pool: Any) -> float:
    """Return how many requests a pool's engine works on, by its own metrics."""
    _, metrics = pool.complete.remote("/metrics")
    return requests_running(str(metrics))


def call(url: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """GET `url`, or POST a JSON body to it; return status and body, whatever the status."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310 - loopback
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@contextmanager
def posted(url: str, body: Any, headers: dict[str, str]) -> Iterator[http.client.HTTPResponse]:
    """POST a JSON body; the answer is open, unread but for status and headers, and leaving the block leaves it."""
    parts = urlsplit(url)
    with closing(http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=BOOT_S)) as connection:
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        connection.request("POST", target, json.dumps(body), {"Content-Type": "application/json", **headers})
        with closing(connection.getresponse()) as answer:
            yield answer


def refused_websocket(url: str, headers: dict[str, str]) -> int:
    """Ask for a websocket that must not be let in; return the status of the refusal."""

    async def ask() -> int:
        async with asyncio.timeout(BOOT_S), aiohttp.ClientSession() as http:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await http.ws_connect(url, headers=headers)
        return refused.value.status

    return asyncio.run(ask())


def streamed(plane: ModalPlane, model: str, body: Any) -> AbstractContextManager[http.client.HTTPResponse]:
    """POST a chat request to a pool through `serve`."""
    url = plane.url_of("vllm-l4", "Server", "serve")
    return posted(f"{url}{CHAT}?model={model}", {"model": model, **body}, plane.proxy_tokens.create().headers)
