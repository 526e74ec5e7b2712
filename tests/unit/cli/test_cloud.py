"""The words that speak to Modal: how soon they refuse what is wrong, and without an account."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.lora import RANK, lay_adapter
from tests.processor_time import bare_s
from tests.unit.cli.outputs import check_error

COMMAND = Path(sys.executable).with_name("vllm-service")
CPU_LIMIT = 35  # times the processor time of a Python that does nothing; 7 to 17 were measured


def run(home: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the command on 80 columns, where Modal is not in reach."""
    environ = {"HOME": str(home), "PATH": os.environ["PATH"], "COLUMNS": "80", "MODAL_SERVER_URL": "http://127.0.0.1:9"}
    line = [str(COMMAND), *arguments]
    return subprocess.run(
        line, env=environ | settings, cwd=home, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["deploy", "no-such-model"],
        ["deploy", "--gpu", "H1000"],
        ["deploy", "--rollback", "--dry-run"],
        ["stop"],
        ["scale", "qwen3-8b"],
        ["upload", "nowhere"],
        ["upload", "."],
        ["test"],
        ["test", "--url", "http://127.0.0.1:9", "--env", "main"],
    ],
)
def test_word_with_wrong_input_is_refused_before_modals_client_is_imported(
    arguments: list[str], tmp_path: Path
) -> None:
    """Exit code 2, an error and a hint."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(tmp_path, *arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stdout) == (2, "")
    check_error(done.stderr)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_LIMIT * bare_s()


def test_upload_of_an_adapter_above_the_rank_of_its_entry_sends_nothing(tmp_path: Path) -> None:
    """The entry of the models file counts; nothing asks for a Modal token."""
    adapter, models = lay_adapter(tmp_path / "loud", 1.0), tmp_path / "models.toml"
    models.write_text(
        '[models.mine]\nhub_id = "me/mine"\nmax_lora_rank = 1\n[[models.mine.adapters]]\nname = "a"\nvolume = "loud"\n'
    )
    done = run(tmp_path, "upload", str(adapter), SERVICE_MODELS_FILE=str(models))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"error: '{adapter}' has rank {RANK}, and model 'mine' serves adapters up to rank 1.",
        "hint: Write max_lora_rank = 8 into the entry of 'mine'; memory is set aside for it.",
    ]


@pytest.mark.parametrize("arguments", [["deploy"], ["list"], ["url"], ["stop", "--all"]])
def test_word_without_an_account_says_how_to_get_one(arguments: list[str], tmp_path: Path) -> None:
    """One sentence and a hint, no traceback."""
    done = run(tmp_path, *arguments)
    error, hint = done.stderr.splitlines()[-2:]
    assert (done.returncode, done.stdout) == (1, "")
    assert error.startswith("error: Modal refused to ")
    assert error.endswith(": this machine has no Modal token, or an invalid one.")
    assert hint.startswith("hint: Run 'modal setup'")
