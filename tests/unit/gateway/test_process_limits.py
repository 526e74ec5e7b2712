"""A process that holds many streams, and what is left of that afterwards."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys

from service.gateway.process_limits import DESCRIPTORS, for_many_streams

LIMITED = """
import os, resource
from service.gateway.process_limits import for_many_streams
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
with for_many_streams():
    opened = [os.pipe() for _ in range(100)]
    for ends in opened:
        os.close(ends[0])
        os.close(ends[1])
print(resource.getrlimit(resource.RLIMIT_NOFILE) == (64, hard))
"""

DOOR = """
import resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
import modal
modal.is_local = lambda: False
import service.gateway_app
from service.gateway.process_limits import DESCRIPTORS
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(DESCRIPTORS, hard))
"""


def test_shells_limit_of_descriptors_is_raised() -> None:
    """Streams are not counted by the shell that the service was started from."""
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.strip() == "True", done.stderr


def test_process_is_as_before_afterwards() -> None:
    """Whoever runs a listener gets its process back as it was."""
    before = gc.get_threshold(), resource.getrlimit(resource.RLIMIT_NOFILE)
    with for_many_streams():
        assert gc.get_threshold() != before[0]
        assert gc.get_freeze_count() > 0
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(DESCRIPTORS, before[1][1])
    assert (gc.get_threshold(), resource.getrlimit(resource.RLIMIT_NOFILE)) == before
    assert gc.get_freeze_count() == 0


def test_door_on_modal_expects_many_streams() -> None:
    """Modal gives its one container a thousand requests at a time, whatever the container's limit is."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", DOOR]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.strip() == "True", done.stderr
