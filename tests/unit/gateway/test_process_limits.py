"""The limits of a process that holds many streams, and that they are restored."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys

import pytest

from service.gateway.process_limits import DESCRIPTORS, connection_limit, raised_process_limits

LIMITED = """
import os, resource
from service.gateway.process_limits import raised_process_limits
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
with raised_process_limits():
    opened = [os.pipe() for _ in range(100)]
    for ends in opened:
        os.close(ends[0])
        os.close(ends[1])
print(resource.getrlimit(resource.RLIMIT_NOFILE) == (64, hard))
"""

GATEWAY = """
import resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
import modal
modal.is_local = lambda: False
import service.gateway_app
from service.gateway.process_limits import DESCRIPTORS
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(DESCRIPTORS, hard))
"""


def test_process_limits_of_a_shell_are_raised() -> None:
    """The shell's limit of file descriptors does not limit the number of streams."""
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize(
    ("descriptors", "clients"), [(64, 1), (1024, 448), (DESCRIPTORS, 32_704), (resource.RLIM_INFINITY, 32_704)]
)
def test_connection_limit_leaves_a_descriptor_to_an_engine_for_each(
    descriptors: int, clients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And some for files."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (descriptors, descriptors))
    assert connection_limit() == clients


def test_process_limits_are_restored() -> None:
    """After the context limits and garbage collection are as before."""
    before = gc.get_threshold(), resource.getrlimit(resource.RLIMIT_NOFILE)
    with raised_process_limits():
        assert gc.get_threshold() != before[0]
        assert gc.get_freeze_count() > 0
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(DESCRIPTORS, before[1][1])
    assert (gc.get_threshold(), resource.getrlimit(resource.RLIMIT_NOFILE)) == before
    assert gc.get_freeze_count() == 0


def test_gateway_on_modal_raises_process_limits() -> None:
    """Modal gives its one container a thousand requests at a time, whatever the container's limit is."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", GATEWAY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.strip() == "True", done.stderr
