"""The image's pins: they resolve for the image's Python and platform, to exactly what the committed lock says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from packaging.markers import Marker, default_environment

from service.engine_env import PINS
from service.image import PYTHON

PLATFORM = "x86_64-manylinux_2_35"  # glibc of the image's base, Ubuntu 22.04
PIN = re.compile(r"^([\w.-]+)==(\S+)(?: ; (.*?))?(?: \\)?$", re.MULTILINE)


def pins(text: str) -> dict[str, str]:
    """Return name -> version of the requirements that hold in the image."""
    image = default_environment() | {
        "python_version": PYTHON,
        "python_full_version": f"{PYTHON}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "platform_system": "Linux",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    held = (found for found in PIN.finditer(text) if not found[3] or Marker(found[3]).evaluate(image))
    return {found[1]: found[2] for found in held}


def test_image_pins_resolve_to_the_committed_lock(tmp_path: Path) -> None:
    """Compiled anew within the lock's versions, nothing is missing from it and nothing in it is superfluous."""
    lock = PINS / "engine-cuda.lock"
    compiled = tmp_path / "compiled.txt"
    target = ["--python-version", PYTHON, "--python-platform", PLATFORM]
    form = ["--no-header", "--no-annotate", "--constraint", str(lock), "-o", str(compiled)]
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", *target, *form, str(PINS / "engine-cuda.in")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UV_FIND_LINKS")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    found = pins(compiled.read_text())
    assert found == pins(lock.read_text())
    assert found["vllm"] == "0.32.0"
    assert found["torch"] == "2.13.0"
