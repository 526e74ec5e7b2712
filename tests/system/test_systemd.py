"""The unit files of the examples."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from service.engine.shutdown import LOCAL_SHUTDOWN
from tests.engine.running import BOOT_S, REPOSITORY, wait_until
from tests.engine.streams import LONGEST, LONGEST_SETTINGS, stream

from . import programs
from .systemd import UNIT, Signalled, Systemd

UNIT_FILES = sorted((REPOSITORY / "examples" / "systemd").rglob(UNIT))
MANAGERS = [Systemd if Systemd.can_start() else Signalled]


@pytest.mark.parametrize("file", UNIT_FILES, ids=lambda file: file.parent.name)
def test_unit_file_is_accepted_by_systemd(file: Path, tmp_path: Path) -> None:
    """Every directive is known, once the command is there."""
    unit = tmp_path / UNIT
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", file.read_text(), flags=re.M))
    command = [programs.find("systemd-analyze"), f"--{file.parent.name}", "verify", str(unit)]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("file", UNIT_FILES, ids=lambda file: file.parent.name)
def test_unit_file_leaves_time_for_the_whole_end(file: Path) -> None:
    """What systemd kills earlier would cut streams."""
    found = re.search(r"^TimeoutStopSec=(\d+)$", file.read_text(), re.M)

    assert found
    assert int(found[1]) > LOCAL_SHUTDOWN.limit_s


@pytest.mark.usefixtures("engine_environment")
@pytest.mark.parametrize("manager", MANAGERS)
def test_stop_of_the_unit_leaves_a_stream_its_whole_grace(manager: type[Systemd | Signalled], tmp_path: Path) -> None:
    """Systemd signals every process of the unit; the engine outlives the drain, and the unit has not failed."""
    with manager(tmp_path, SERVICE_MODEL="tiny", **LONGEST_SETTINGS) as unit, ThreadPoolExecutor(1) as pool:
        wait_until(lambda: is_healthy(unit.url), BOOT_S)
        with stream(unit, **LONGEST) as events:
            asked = time.monotonic()
            result = pool.submit(unit.stop)
            *_, error, done = events
            took_s = time.monotonic() - asked
        assert result.result() == "success", unit.log
    assert (json.loads(error)["error"]["code"], done) == ("shutting_down", "[DONE]")
    assert took_s >= LOCAL_SHUTDOWN.drain_s


def is_healthy(url: str) -> bool:
    """Tell whether a service answers."""
    try:
        return requests.get(f"{url}/health", timeout=5).ok
    except requests.RequestException:
        return False
