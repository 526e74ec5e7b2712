"""Planes for the plane's own tests: one that tests with pools of their own share, and fresh ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import modal
import pytest
from tests import preloaded

from .modal import ContainerRuntime, ModalPlane, client_directory
from .sample import deploy, running


@pytest.fixture(scope="session")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> ContainerRuntime:
    """Containers that run with this environment's interpreter and the client mounted beside it."""
    client = client_directory(tmp_path_factory.mktemp("client"))
    return ContainerRuntime(client_path=client, preloaded=preloaded.serve(sys.executable, *preloaded.CONTAINER))


@pytest.fixture
def plane(tmp_path: Path, runtime: ContainerRuntime) -> Iterator[ModalPlane]:
    """A plane for one test."""
    with running(tmp_path, runtime) as plane:
        yield plane


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, runtime: ContainerRuntime) -> Iterator[ModalPlane]:
    """A plane with the sample deployed, for tests that leave nothing behind but pools of their own model."""
    with running(tmp_path_factory.mktemp("shared"), runtime) as plane:
        deploy(plane)
        yield plane


@pytest.fixture(scope="session")
def client(shared: ModalPlane) -> modal.Client:
    """A client in this process."""
    return shared.client()
