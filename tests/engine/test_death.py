"""Starts that fail: exit code 1, nothing left, and on stderr the root cause with what to do, not vLLM's last line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .dialogues import TINY
from .running import Service

Start = Callable[..., Service]


def broken(directory: Path, **fields: Any) -> dict[str, str]:
    """Write a models file with an entry `broken`, a copy of the tiny model with these fields; return its setting."""
    shutil.copytree(TINY, directory / "copy")
    entry = {"path": "copy", "max_model_len": 2048, "weights_gb": 0.004, **fields}
    lines = ["[models.broken]", *(f"{name} = {json.dumps(value)}" for name, value in entry.items())]
    (directory / "models.toml").write_text("\n".join(lines))
    return {"SERVICE_MODELS_FILE": str(directory / "models.toml")}


def last_lines(service: Service) -> str:
    """Wait for a start that fails and return its error; nothing of it runs any more."""
    service.wait_said("Importing vLLM").engine()
    assert service.wait_ended() == 1, service.story
    assert service.engine() == []
    assert "Ready" not in service.out
    assert "Traceback" not in service.err
    error, hint = service.err.splitlines()[-2:]
    assert error.startswith("error: The engine exited with code ")
    assert hint.startswith("hint: ")
    assert "before it was ready" in error
    return f"{error} {hint}"


def test_start_of_a_model_that_needs_code_of_its_repository_is_refused(start: Start, tmp_path: Path) -> None:
    """The code is not run, and the hint says what allows it."""
    setting = broken(tmp_path)
    config = tmp_path / "copy" / "config.json"
    unknown = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | unknown))
    (tmp_path / "copy" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")

    said = last_lines(start("broken", **setting))
    assert "contains custom code" in said
    assert "--trust-remote-code in extra_args" in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("fields", "cause", "advice"),
    [
        ({"extra_args": ["--no-such-flag", "7"]}, "unrecognized arguments: --no-such-flag", "extra_args"),
        ({"reasoning_parser": "qwen99"}, "'qwen99' not found", "reasoning_parser"),
        ({"max_model_len": 999999}, "is greater than the derived max_model_len", "Lower max_model_len"),
        ({"extra_args": ["--kv-cache-memory-bytes", str(10**15)]}, "requested memory for kv", "extra_args"),
    ],
    ids=["flag", "parser", "context", "KV cache"],
)
def test_start_with_a_wrong_entry_names_the_cause(
    start: Start, tmp_path: Path, fields: dict[str, Any], cause: str, advice: str
) -> None:
    """What the engine refuses in an entry is told in the engine's own words, with the field to correct."""
    said = last_lines(start("broken", **broken(tmp_path, **fields)))
    assert cause in said.partition("Cause: ")[2]
    assert advice in said.rpartition("'.")[2]


def test_start_with_cut_weights_says_that_they_are_damaged(start: Start, tmp_path: Path) -> None:
    """Half a safetensors file: the cause is the reader's, far above the last line of the engine's log."""
    environment = broken(tmp_path)
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    service = start("broken", **environment)
    said = last_lines(service)
    assert "Error while deserializing header" in said.partition("Cause: ")[2]
    assert "weights are damaged" in said
    assert "deserializing" not in service.log_file.read_text().strip().splitlines()[-1]


def test_start_without_a_tokenizer_names_it(start: Start, tmp_path: Path) -> None:
    """A directory without tokenizer files is refused with the word tokenizer, by the first part that notices."""
    environment = broken(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "copy" / name).unlink()
    service = start("broken", **environment)
    assert service.wait_ended() == 1, service.story
    assert "tokenizer" in service.err.splitlines()[-1]


def test_start_keeps_its_port_from_the_beginning(tiny: Service) -> None:
    """Nobody else can take the port while the engine imports, and nobody is let in before it is ready."""
    assert tiny.port_while_starting == ("Address already in use", "Connection refused")


def test_start_of_a_directory_that_is_no_model_starts_no_engine(start: Start, tmp_path: Path) -> None:
    """A path without config.json is refused before anything is started, with the path."""
    environment = broken(tmp_path)
    (tmp_path / "copy" / "config.json").unlink()
    service = start("broken", **environment)
    assert service.wait_ended(20) == 1
    assert str(tmp_path / "copy") in service.err
    assert "config.json" in service.err
    assert "Starting the engine" not in service.err
