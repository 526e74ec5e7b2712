"""Faults under load; `make soak` runs many more."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from bench.chaos.run import faults
from bench.chaos.series import run_all
from bench.chaos.site import Site

SEED = 20


@pytest.mark.usefixtures("engine_environment")
def test_forty_faults_under_load_leave_the_service_whole() -> None:
    """Every request has ended as documented, all models answer again, and nothing is left; the output says which."""
    episodes, left = asyncio.run(run_all([*islice(faults(SEED, long=False), 40)], short=True))

    assert [violation for episode in episodes for violation in episode.violations] == []
    assert left == []


def test_process_that_has_overwritten_its_environment_is_found_and_killed(tmp_path: Path) -> None:
    """As an engine core does, whose parent has died."""
    with Site(tmp_path) as site:
        environment = {"LD_PRELOAD": str(tmp_path / "clock.so")}  # nothing else of the site's
        orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=environment)
        assert [f"process {orphan.pid} " in left for left in site.left_of_all()] == [True]
    assert orphan.wait(10) < 0
