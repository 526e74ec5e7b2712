"""The Dockerfile, whose steps are run without Docker: `dockerfile` says how."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from service.engine import environment
from service.engine.shutdown import LOCAL_SHUTDOWN
from tests.docs.clone import copy_repository
from tests.engine.dialogues import QUESTION
from tests.engine.running import BOOT_S, ONE_THREAD, REPOSITORY, wait_until

from . import programs
from .dockerfile import Container, as_root

KEY = "sk-of-the-container-4d7e"
ENGINES = "/home/vllm/.cache/vllm-service/engines"
ASK = """
import sys, urllib.request
headers = {"Content-Type": "application/json", "Authorization": "Bearer " + sys.argv[2]}
url = "http://127.0.0.1:8000/v1/chat/completions"
print(urllib.request.urlopen(urllib.request.Request(url, sys.argv[1].encode(), headers)).read().decode())
"""
DOCS = (REPOSITORY / "docs/docker.md").read_text()


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Container:
    """The built image: all steps but the one that installs Ubuntu's packages."""
    context = tmp_path_factory.mktemp("context")
    copy_repository(context)
    container = Container(tmp_path_factory.mktemp("image"), context)
    (skipped,) = container.build(skipped="apt-get")
    assert "python3-venv" in skipped
    return container


def test_base_image_is_pinned_and_the_user_has_no_privileges(container: Container) -> None:
    """By the digest of its index; the user's own directories are the volumes."""
    image = container.image
    assert re.fullmatch(r"nvidia/cuda:13\.0\.2-devel-ubuntu24\.04@sha256:[0-9a-f]{64}", image.base)
    assert image.user == "vllm"
    assert image.volumes == ["/home/vllm/.cache", "/home/vllm/.local/state"]
    assert image.ports == ["8000"]


def test_commands_of_the_docs_fit_the_image(container: Container) -> None:
    """They build this Dockerfile, mount the volumes, and leave time for the whole end."""
    assert "docker build -t vllm-service .\n" in DOCS
    (started,) = re.findall(r"^docker run .*\\\n.*$", DOCS, re.M)
    assert re.findall(r"--volume [\w-]+:(\S+)", started) == container.image.volumes
    (stop,) = re.findall(r"--stop-timeout (\d+) ", DOCS)
    assert int(stop) > LOCAL_SHUTDOWN.limit_s
    assert "--publish 127.0.0.1:8000:8000" in DOCS


@pytest.fixture(scope="module")
def running(container: Container, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[bytes]]:
    """The container as `docker run` starts it with a key, with the engine's environment in its volume."""
    cached = Path(environment.ensure().python).parents[2]
    image = container.image
    given = {**container.environment, **ONE_THREAD, "API_KEY": KEY, "HF_HUB_OFFLINE": "1"}
    log = tmp_path_factory.mktemp("log") / "log"
    command = container.command([*image.entrypoint, *image.cmd], (ENGINES, cached))
    with log.open("wb") as output, subprocess.Popen(command, env=given, stdout=output, stderr=output) as process:
        try:
            wait_until(lambda: "Ctrl-C stops it." in log.read_text() or process.poll() is not None, BOOT_S)
            assert process.poll() is None, log.read_text()
            yield process
        finally:
            process.kill()


def first(running: subprocess.Popen[bytes]) -> psutil.Process:
    """Return the container's first process, as the machine numbers it."""
    started = psutil.Process(running.pid)
    unshare = next(one for one in [started, *started.children(recursive=True)] if one.name() == "unshare")
    (process,) = unshare.children()
    return process


def inside(running: subprocess.Popen[bytes], *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the container, as `docker exec` does."""
    enter = [programs.find("nsenter"), f"--target={first(running).pid}", "--mount", "--net", "--pid", "--root"]
    return subprocess.run(
        [*as_root(), *enter, *command],
        env={"PATH": os.defpath},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_container_serves_with_its_key_as_its_user(container: Container, running: subprocess.Popen[bytes]) -> None:
    """One chat; none without the key."""
    body = json.dumps({"model": "llm", **QUESTION})
    python = container.image.healthcheck[0]
    assert "Paris" in inside(running, python, "-c", ASK, body, KEY).stdout
    assert "401" in inside(running, python, "-c", ASK, body, "wrong").stderr
    assert set(first(running).uids()) == {10001}


def test_health_check_tells_a_service_from_none(container: Container, running: subprocess.Popen[bytes]) -> None:
    """Exit code 0, and another where nothing answers."""
    command = container.image.healthcheck
    assert inside(running, *command).returncode == 0
    assert inside(running, "env", "SERVICE_PORT=8001", *command).returncode == 1


def test_stop_of_the_container_ends_it_with_0_in_time(running: subprocess.Popen[bytes]) -> None:
    """As `docker stop` does: SIGTERM to the first process."""
    first(running).terminate()
    assert running.wait(LOCAL_SHUTDOWN.limit_s) == 0


def test_container_without_a_key_refuses_to_listen(container: Container, tmp_path: Path) -> None:
    """It would be open to everybody who reaches the port."""
    image = container.image
    command = container.command([*image.entrypoint, *image.cmd], (ENGINES, tmp_path))
    done = subprocess.run(command, env=container.environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "API_KEY" in done.stderr


def test_other_words_of_the_command_run_in_the_container(container: Container, tmp_path: Path) -> None:
    """The docs make a key so; it is kept in the volume of the state."""
    entry = container.image.entrypoint
    for words, said in ((["keys", "new", "alice"], "sk-"), (["keys", "list"], "alice")):
        command = container.command([*entry, *words], (ENGINES, tmp_path))
        done = subprocess.run(
            command, env=container.environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
