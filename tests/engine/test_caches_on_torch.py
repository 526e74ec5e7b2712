"""The engine's torch with the caches of another replica: held at its imports as under a snapshot, then compiling."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.hardware import probe
from service.replica.compile_caches import Caches

SCRIPT = """
import json, sys
import torch, transformers, torch._dynamo.package
print("imported", flush=True)
sys.stdin.readline()  # the checkpoint
from torch._dynamo.utils import counters
compiled = torch.compile(lambda x: (x.sin() + x.cos()).relu().sum(-1))
compiled(torch.ones(8, 32))
print(json.dumps(counters["inductor"]), flush=True)
"""


@pytest.fixture
def replica(tmp_path: Path) -> Callable[[], Caches]:
    """Return a function that gives a new replica: an empty disk at the path of all, and the one volume."""

    def begin() -> Caches:
        shutil.rmtree(tmp_path / "local", ignore_errors=True)
        return Caches(tmp_path / "local", {"torch": "2.13.0"}, {"vllm": tmp_path / "volume"})

    return begin


def boot(caches: Caches, python: str) -> dict[str, Any]:
    """Spawn before the hardware is known and compile after; return inductor's counters."""
    with subprocess.Popen(
        [python, "-c", SCRIPT], env=dict(os.environ) | caches.env(), text=True, stdin=-1, stdout=-1
    ) as child:
        assert child.stdin
        assert child.stdout
        assert child.stdout.readline() == "imported\n"
        caches.select_hardware(probe().fingerprint("cpu"))
        print(file=child.stdin, flush=True)
        counted: dict[str, Any] = json.loads(child.stdout.readline())
    return counted


def libraries(caches: Caches) -> dict[Path, int]:
    """Return what the C++ compiler built, with the time of each."""
    root = Path(caches.env()["VLLM_CACHE_ROOT"])
    return {path.relative_to(root): path.stat().st_mtime_ns for path in root.rglob("*.so")}


def test_second_replica_compiles_nothing_anew(
    engine_python: str, replica: Callable[[], Caches], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one made is found by the next on an empty disk, and there is nothing new to save."""
    monkeypatch.setattr("service.replica.archive._SETTLED_S", 0)  # the child has ended: nothing is being written
    first = replica()
    first.load()
    assert boot(first, engine_python)["fxgraph_cache_miss"] == 1
    built = libraries(first)
    assert built
    assert first.save() > 0

    second = replica()
    assert second.load() > 0
    counted = boot(second, engine_python)

    assert counted["fxgraph_cache_hit"] == 1
    assert "fxgraph_cache_miss" not in counted
    assert libraries(second) == built
    assert second.save() == 0
