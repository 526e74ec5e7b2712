"""`vllm-service prefetch` and `models --outdated` at the real command line, where no hub and no account is in reach."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.cli.outputs import check_error

COMMAND = Path(sys.executable).with_name("vllm-service")
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that runs the command in an empty home."""
    env = {
        "HOME": str(tmp_path), "PATH": os.defpath, "HF_ENDPOINT": "http://127.0.0.1:9",
        "MODAL_CONFIG_PATH": str(tmp_path / "none.toml"),
    }  # fmt: skip

    def command(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        line = [str(COMMAND), *arguments]
        return subprocess.run(
            line, env=env | environ, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )

    return command


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("prefetch",), 2, "error: No model is named. Registered: qwen3-8b"),
        (("prefetch", "qwen3-8"), 2, "Did you mean 'qwen3-8b'?"),
        (("prefetch", "--all", "tiny"), 2, "leave out tiny"),
        (("prefetch", "--modal", "org/unheard-of"), 2, "Unknown model 'org/unheard-of'"),
        (("prefetch", "--modal", "qwen3-8b"), 1, "modal setup"),
        (("prefetch", "qwen3-0.6b"), 1, "Qwen/Qwen3-0.6B at revision c1899de"),
        (("prefetch", "org/unheard-of"), 1, "org/unheard-of is at no known commit"),
        (("models", "--outdated"), 1, "is not in reach, and only it knows the newest commits"),
    ],
)
def test_command_that_fails_prints_an_error_and_at_most_one_hint(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    """Usage ends with 2, the world with 1; no lock file is left behind."""
    done = run(*arguments)

    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    check_error(done.stderr)
    assert not list(tmp_path.rglob("*.toml"))


def test_prefetch_of_a_directory_needs_no_hub(run: Run) -> None:
    """The built-in model is here already."""
    done = run("prefetch", "tiny", "--json")

    assert (done.returncode, done.stderr) == (0, "")
    assert [(row["key"], row["fetched"]) for row in json.loads(done.stdout)["models"]] == [("tiny", False)]


def test_prefetch_with_a_broken_lock_file_names_it(run: Run, tmp_path: Path) -> None:
    """Nothing is fetched of what may be another commit."""
    (tmp_path / "mine.toml").write_text('[models.mine]\nhub_id = "org/mine"\n')
    (tmp_path / "mine.lock.toml").write_text('[revisions]\n"org/mine" = "main"\n')
    done = run("prefetch", "mine", SERVICE_MODELS_FILE=str(tmp_path / "mine.toml"))

    assert done.returncode == 2
    assert f"Lock file '{tmp_path / 'mine.lock.toml'}': 'org/mine' is 'main'" in done.stderr
