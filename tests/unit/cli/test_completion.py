"""Completion in a real bash, as `vllm-service --install-completion` sets it up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# What readline does: it calls the function that `complete` names, with the words and the place of the cursor.
_COMPLETE = """
source ~/.bashrc
name=$(complete -p vllm-service | sed 's/.*-F \\([^ ]*\\).*/\\1/')
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
"$name" "$1"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home directory in which completion is installed."""
    home = tmp_path_factory.mktemp("home")
    done = bash(home, "vllm-service --install-completion && echo done")
    assert done.stdout.splitlines()[-1] == "done", done.stderr
    return home


def bash(home: Path, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script with words in a home directory."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.defpath])
    return subprocess.run(
        ["bash", "-uc", script, "bash", *words], env={"HOME": str(home), "PATH": path, "TERM": "dumb"},
        cwd=home, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["dep"], ["deploy"]),
        (["up", "gemma-3"], ["gemma-3-12b", "gemma-3-27b"]),
        (["prefetch", "tiny", "gpt-"], ["gpt-oss-120b", "gpt-oss-20b"]),
        (["deploy", "qwen3-8b", "--gpu", "B2"], ["B200", "B200+"]),
        (["url", "H1"], ["H100", "H100!"]),
        (["test", "--model", "tin"], ["tiny"]),
        (["keys", "new", "alice", "--model", "tin"], ["tiny"]),
        (["models", "--out"], ["--outdated"]),
    ],
    ids=" ".join,
)
def test_completion_in_bash_offers_words_options_models_and_gpus(
    home: Path, words: list[str], completed: list[str]
) -> None:
    """The registry's keys, without a message on the terminal."""
    done = bash(home, _COMPLETE, "vllm-service", *words)
    assert (sorted(done.stdout.split()), done.stderr) == (completed, "")


def test_completion_with_a_wrong_models_file_offers_nothing_and_is_silent(home: Path) -> None:
    """The command itself says what is wrong with it."""
    done = bash(home, f"export SERVICE_MODELS_FILE=nowhere.toml\n{_COMPLETE}", "vllm-service", "up", "g")
    assert (done.stdout.split(), done.stderr) == ([], "")
