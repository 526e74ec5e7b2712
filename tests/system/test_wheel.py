"""The wheel, in an environment of its own and without the repository: on this machine, and for a deploy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from service import __version__
from service.engine.pip_settings import uv_settings
from tests.docs.clone import copy_repository
from tests.engine.dialogues import QUESTION
from tests.engine.running import GONE_S, ONE_THREAD, REPOSITORY
from tests.fakes.modal import ContainerRuntime, ModalPlane, client_directory

from .services import InTerminal

BIN = Path(sys.executable).parent
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a clone as the README has it."""
    clone = tmp_path_factory.mktemp("clone")
    copy_repository(clone)
    env = {**os.environ, **uv_settings().env}
    subprocess.run([BIN / "uv", "build", "--quiet", "--wheel"], cwd=clone, env=env, check=True, timeout=120)
    (wheel,) = (clone / "dist").glob("*.whl")
    return wheel


class FromWheel(InTerminal):
    """`uvx --from <wheel> vllm-service up`, in a terminal, a home and a working directory of its own."""

    def __init__(self, directory: Path, wheel: Path) -> None:
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
        elsewhere = {"HOME": str(directory), "XDG_CACHE_HOME": cache, "HF_HUB_OFFLINE": "1"}
        super().__init__(directory, **elsewhere, **uv_settings().env, **ONE_THREAD)
        self._command = [*uvx(wheel), "vllm-service", "up"]
        self._cwd = directory

    @property
    def pid(self) -> int:
        """Process id of the service, which uvx waits for."""
        (service,) = psutil.Process(self._process.pid).children()
        return service.pid


def uvx(wheel: Path) -> list[str]:
    """Return the command that runs what comes after it in an environment with the wheel."""
    cache = str(wheel.with_name("uv-cache"))
    return [str(BIN / "uvx"), "--quiet", "--cache-dir", cache, "--python", sys.executable, "--from", str(wheel)]


def run(plane: ModalPlane, wheel: Path, *command: str, **environment: str) -> str:
    """Run a command of the wheel's environment with an account; return its output."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SERVICE_", "MODAL_"))}
    home = {"HOME": str(plane.workdir), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [*uvx(wheel), *command],
        cwd=plane.workdir,
        env={**inherited, **uv_settings().env, **home, **plane.env, **environment},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_has_all_files_of_the_package(wheel: Path) -> None:
    """Registry, pins, assets, and what runs inside the engine."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "service"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    with zipfile.ZipFile(wheel) as archive:
        assert sorted(listed.stdout.strip("\0").split("\0")) == sorted(
            name for name in archive.namelist() if name.startswith("service/")
        )


@pytest.mark.usefixtures("engine_environment")
def test_wheel_serves_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    """One chat, and Ctrl-C ends it with code 0; the engine's environment is reused."""
    with FromWheel(tmp_path, wheel) as service:
        service.wait_ready().engine()
        answer = requests.post(f"{service.url}{CHAT}", json={"model": "llm", **QUESTION}, timeout=60)
        assert "Paris" in answer.text
        asked = time.monotonic()
        service.type(b"\x03")
        assert service.wait_ended(GONE_S) == 0, service.story
        service.wait_gone(asked + GONE_S)


def test_wheel_deploys_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    """By its own command and by Modal's."""
    runtime = ContainerRuntime(client_path=client_directory(tmp_path / "client"))
    with ModalPlane(tmp_path / "plane", container=runtime) as plane:
        assert run(plane, wheel, "vllm-service", "--version") == f"vllm-service {__version__}\n"
        plan: Any = json.loads(run(plane, wheel, "vllm-service", "deploy", "tiny", "--dry-run", "--json"))
        assert {app["app"]: app["action"] for app in plan["apps"]} == {"vllm-l4": "create", "vllm-gateway": "create"}
        run(plane, wheel, "python", "-m", "modal", "deploy", "-m", "service.server", SERVICE_MODEL="tiny")
        assert [name for name, app in plane.apps.items() if app.is_deployed] == ["vllm-l4"]
        assert plane.failures == []
        assert plane.unknown_calls == []
