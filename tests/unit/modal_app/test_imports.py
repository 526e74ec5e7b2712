"""Importing a deployed module opens no connection and writes no file: tests and language servers import it too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Imports a module, and prints each connection, look-up, program and changed file on the way.
WATCHED = """
import os, sys

def watch(event, arguments):
    if event == "open":
        path, _, flags = arguments
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or path == os.devnull:
            return
    elif event not in EVENTS:
        return
    print(event, *arguments)

EVENTS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "subprocess.Popen",
          "os.mkdir", "os.rename", "os.remove", "os.truncate", "os.symlink", "os.link"}
sys.addaudithook(watch)
__import__(sys.argv[1])
"""


@pytest.mark.parametrize("module", ["service.server", "service.gateway_app"])
@pytest.mark.parametrize("model", ["mine", "gemma-3-12b"])
def test_import_of_what_is_deployed_opens_no_connection_and_writes_no_file(
    module: str, model: str, tmp_path: Path
) -> None:
    """Neither for an entry without a revision nor for a gated model, though hub and Modal are configured."""
    (tmp_path / "models.toml").write_text('[models.mine]\nhub_id = "org/mine"\n')
    environ = {
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "MODAL_SERVER_URL": "http://127.0.0.1:9",
        "MODAL_TOKEN_ID": "ak-test",
        "MODAL_TOKEN_SECRET": "as-test",
        "SERVICE_MODEL": model,
        "SERVICE_MODELS_FILE": "~/models.toml",
    }
    line = [sys.executable, "-c", WATCHED, module]
    done = subprocess.run(line, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [file.name for file in tmp_path.iterdir()] == ["models.toml"]
