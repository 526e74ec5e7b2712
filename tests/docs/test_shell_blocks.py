"""Runs every shell block of README, CONTRIBUTING and docs; `reader` tells what to do about one that fails."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from service.engine import environment
from service.weights import revisions
from tests.clients import client_env
from tests.contract.conftest import runtime_with_engine
from tests.engine.dialogues import TINY
from tests.engine.running import REPOSITORY, Service, free_port, serving
from tests.fakes import hub as fake_hub
from tests.fakes.modal import ModalPlane

from .blocks import Block, shell_blocks
from .reader import HUB_TOKEN, Reader

BLOCKS = shell_blocks()
LOCAL_URL = "http://127.0.0.1:8000"  # where a page has no variable
README = REPOSITORY / "README.md"
UPLOADED = '[models.support-bot]\nvolume = "support-bot"\ngpu = "L4"\n'  # as `upload` prints it
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The tiny model on this machine, without keys."""
    environment.ensure()
    with serving(tmp_path_factory.mktemp("served"), "tiny") as service:
        yield service


@pytest.fixture(scope="module")
def hub() -> Iterator[fake_hub.Hub]:
    """A hub whose repositories, those of the registry and of the README's entry, all have the tiny model."""
    files: dict[str, bytes | Path] = {file.name: file for file in TINY.iterdir() if file.suffix != ".toml"}
    config = json.loads((TINY / "config.json").read_text())
    files["config.json"] = json.dumps(config | {"max_position_embeddings": 1 << 17}).encode()
    commits = {"org/name": COMMIT}
    for spec in revisions.registry(None).specs.values():
        commits |= {hub_id: commit or COMMIT for hub_id, commit in spec.repositories}
    repositories = {name: fake_hub.Repository(commit, files) for name, commit in commits.items()}
    with fake_hub.serving(fake_hub.Hub(repositories=repositories, token=HUB_TOKEN)) as hub:
        yield hub


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory, hub: fake_hub.Hub) -> Iterator[ModalPlane]:
    """An account with the secret of gated models, whose containers have the engine."""
    runtime = runtime_with_engine(tmp_path_factory.mktemp("client"))
    environment = {**runtime.environment, "HF_ENDPOINT": hub.url}
    runtime = dataclasses.replace(runtime, environment=environment, host_ports=[urlsplit(hub.url).port or 0])
    with ModalPlane(tmp_path_factory.mktemp("plane"), container=runtime) as plane:
        plane.secrets.put("huggingface", {"HF_TOKEN": HUB_TOKEN})
        yield plane
        assert plane.failures == []
        assert plane.unknown_calls == []


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, hub: fake_hub.Hub, plane: ModalPlane, service: Service) -> Reader:
    """A reader who goes through the pages in their order."""
    environment = {"HF_ENDPOINT": hub.url, "SERVICE_PORT": str(free_port()), **plane.env}
    programs = [client_env.bin_directory()]
    reader = Reader(tmp_path_factory.mktemp("reader"), programs, service.url, **environment)
    (entry,) = re.findall(r"^```toml\n(# my-models.toml\n.*?)^```$", README.read_text(), re.M | re.S)
    models = entry.replace("<40 hexadecimal digits>", COMMIT) + UPLOADED
    (reader.clone / "my-models.toml").write_text(models)
    shutil.copytree(TINY, reader.clone / "my-model")
    return reader


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_shell_block_does_what_the_page_says(block: Block, reader: Reader, service: Service, plane: ModalPlane) -> None:
    """Every command ends with 0, or does its work until Ctrl-C.

    An account lacks the secrets that a block makes; what a page shows of a deployed service is deployed before.
    """
    if "--modal" in block.text and not plane.apps:
        reader.run(Block(block.page, block.line, "bash", "vllm-service deploy tiny"), {})
    for name in set(re.findall(r"secret create (\S+)", block.text)) & set(plane.secrets.names()):
        plane.secrets.remove(name)
    reader.run(block, {LOCAL_URL: service.url})
