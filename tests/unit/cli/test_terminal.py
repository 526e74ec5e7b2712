"""What people see: the registry as table and JSON, the greeting, the progress."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.cli.terminal import Terminal, print_models
from service.errors import UnknownModelError
from service.local.serve import Ready
from service.registry.models import ModelSpec, Registry

REGISTRY = Registry.load()
Capture = pytest.CaptureFixture[str]


def greeting(tmp_path: Path, capsys: Capture, *, asks_for_key: bool) -> str:
    """Return what is printed when the service is ready."""
    with Terminal(tmp_path / "x.log", verbose=False) as terminal:
        terminal.ready(Ready(REGISTRY.specs["tiny"], "http://127.0.0.1:8000/v1", 4.25, asks_for_key))
    return capsys.readouterr().out


def test_models_as_json_are_one_object_each(capsys: Capture) -> None:
    """Every entry, with GPU, price, context, parsers, and whether it is gated."""
    print_models(REGISTRY, "qwen3-8b", as_json=True)
    rows = json.loads(capsys.readouterr().out)

    assert [row["key"] for row in rows] == list(REGISTRY.specs)
    first = rows[0]
    assert (first["gpu"], first["n_gpu"], first["dollars_per_hour"], first["max_model_len"]) == ("H100", 1, 3.95, 40960)
    assert (first["tool_call_parser"], first["reasoning_parser"], first["gated"]) == ("hermes", "qwen3", False)
    assert [row["key"] for row in rows if row["default"]] == ["qwen3-8b"]


def test_models_as_json_are_not_wrapped_by_a_narrow_terminal(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program reads it."""
    monkeypatch.setenv("COLUMNS", "20")
    print_models(REGISTRY, "qwen3-8b", as_json=True)

    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("columns", ["20", "80", "200"])
def test_models_as_table_show_each_whole(capsys: Capture, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    """Whatever the terminal's width no name is cut: people copy from here."""
    monkeypatch.setenv("COLUMNS", columns)
    print_models(REGISTRY, "qwen3-8b", as_json=False)
    lines = capsys.readouterr().out.splitlines()

    for spec in REGISTRY.specs.values():
        line = next(line for line in lines if line.startswith(f"{spec.key} "))
        assert spec.hub_id is None or line.rstrip().endswith(spec.hub_id)
        assert f"{spec.tier.dollars_per_hour:.2f}" in line
        assert f"{spec.max_model_len:,}" in line
        assert ("yes" in line.split()) == spec.gated


def test_models_as_table_mark_the_default_and_date_the_prices(capsys: Capture) -> None:
    """The star is explained below."""
    print_models(REGISTRY, "gemma-3-12b", as_json=False)
    out = capsys.readouterr().out

    assert [line.split()[0] for line in out.splitlines() if line.split()[1:2] == ["*"]] == ["gemma-3-12b"]
    assert "2026-09-26" in out


def test_models_as_table_show_an_entry_that_says_little(capsys: Capture) -> None:
    """A dash for what vLLM decides by itself."""
    registry = Registry({"mine": ModelSpec(key="mine", hub_id="org/mine")})
    print_models(registry, "mine", as_json=False)

    assert next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mine")).count(" - ") >= 2


@pytest.mark.parametrize("default", ["llm", "qwen3-8b", "QWEN/qwen3-8b-FP8", "qwen3-8b-h200"])
def test_models_can_be_listed_under_any_name_of_the_default(capsys: Capture, default: str) -> None:
    """`SERVICE_MODEL=llm` is the default model by its other name."""
    print_models(REGISTRY, default, as_json=True)

    assert [row["key"] for row in json.loads(capsys.readouterr().out) if row["default"]] == ["qwen3-8b"]


def test_models_with_an_unknown_default_are_refused() -> None:
    """As at a deploy."""
    with pytest.raises(UnknownModelError):
        print_models(REGISTRY, "nothing-like-it", as_json=True)


@pytest.mark.parametrize("asks_for_key", [True, False])
def test_greeting_has_python_lines_that_compile(tmp_path: Path, capsys: Capture, asks_for_key: bool) -> None:
    """They are pasted as they are; a key is taken from the environment, never printed."""
    text = greeting(tmp_path, capsys, asks_for_key=asks_for_key)
    begin = text.index("import os\n" if asks_for_key else "from openai")
    lines = text[begin : text.index("\n\nCtrl-C")]
    compile(lines, "greeting", "exec")

    assert 'base_url="http://127.0.0.1:8000/v1"' in lines
    assert ('os.environ["API_KEY"]' in lines) == asks_for_key


@pytest.mark.parametrize("asks_for_key", [True, False])
def test_greeting_has_a_curl_line_that_a_shell_reads(tmp_path: Path, capsys: Capture, asks_for_key: bool) -> None:
    """Its body is JSON, its address the service's, the key the shell's own variable."""
    import shlex

    text = greeting(tmp_path, capsys, asks_for_key=asks_for_key)
    words = shlex.split(text[text.index("curl ") : text.index("\n\n", text.index("curl "))])

    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(words[words.index("-d") + 1])["model"] == "llm"
    assert ("Authorization: Bearer $API_KEY" in words) == asks_for_key


def test_greeting_says_model_time_and_log(tmp_path: Path, capsys: Capture) -> None:
    """What is served, how long it took, and where the engine's output is."""
    text = greeting(tmp_path, capsys, asks_for_key=False)

    assert "Ready after 4.2 s: tiny at http://127.0.0.1:8000/v1" in text
    assert str(tmp_path / "x.log") in text.replace("\n", "")


@pytest.mark.parametrize("verbose", [True, False])
def test_terminal_keeps_the_engines_output_in_a_file(tmp_path: Path, capsys: Capture, verbose: bool) -> None:
    """And shows it only when asked to, as it is."""
    with Terminal(tmp_path / "deep" / "x.log", verbose) as terminal:
        terminal.engine_line("INFO [red]not markup[/red]")
    terminal.engine_line("too late")

    assert (tmp_path / "deep" / "x.log").read_text() == "INFO [red]not markup[/red]\n"
    assert ("[red]not markup[/red]" in capsys.readouterr().err) == verbose


def test_terminal_shows_progress_on_stderr_only(tmp_path: Path, capsys: Capture) -> None:
    """Stdout is for results; phases without a text for people are not shown."""
    with Terminal(tmp_path / "x.log", verbose=False) as terminal:
        terminal.phase("weights")
        terminal.phase("woken")
        terminal.say("A sentence with [brackets].")
    out, err = capsys.readouterr()

    assert out == ""
    assert err.splitlines() == ["Looking for the weights", "A sentence with [brackets]."]
