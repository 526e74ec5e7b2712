"""The CUDA environment, built once in the user's cache directory, and the stub of NVIDIA's driver."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from service.engine import environment
from tests.system import programs


@pytest.fixture(scope="session")
def cuda_python() -> str:
    """Interpreter of the environment that machines with a GPU have, from the same lock."""
    return environment.ensure("cuda").python


@pytest.fixture(scope="session")
def driver_stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with a libcuda.so.1 that knows no device; nothing that serves has it on its library path."""
    directory = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("driver_stub.c")
    command = [
        programs.find("cc"),
        "-shared",
        "-fPIC",
        "-Wl,-soname,libcuda.so.1",
        "-o",
        str(directory / "libcuda.so.1"),
    ]
    subprocess.run([*command, str(source)], check=True, timeout=60)
    return directory
