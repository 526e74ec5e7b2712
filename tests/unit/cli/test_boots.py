"""`vllm-service boots` at the real command line: tables, JSON; what it says where there is nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from service.boots import records
from service.boots.records import BootRecord, Span
from tests.unit.boots.test_records import record

COMMAND = Path(sys.executable).with_name("vllm-service")
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that runs `vllm-service boots` in an empty home directory, with no account."""
    (tmp_path / "home").mkdir()
    env = {"HOME": str(tmp_path / "home"), "PATH": os.defpath, "XDG_STATE_HOME": str(tmp_path / "state")}

    def command(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        line = [str(COMMAND), "boots", *arguments]
        where = tmp_path / "home"
        return subprocess.run(
            line, env=env | environ, cwd=where, capture_output=True, text=True, timeout=60, check=False
        )

    return command


@pytest.fixture
def kept() -> list[BootRecord]:
    """Keep boots of three strategies on this machine; return them, oldest first."""
    found = []
    for number, (strategy, restored, seconds, outcome) in enumerate(
        [
            ("off", False, 40.0, "ready"),
            ("gpu", False, 20.0, "ready"),
            ("gpu", True, 8.0, "ready"),
            ("gpu", True, 10.0, "ready"),
            ("gpu", True, 45.0, "cold"),
            ("off", False, 3.0, "failed"),
        ]
    ):
        spans = (Span("import", -12.5, 0.0), Span("queue", 0.0, 1.5), Span("checks [bold]", 1.5, seconds))
        changes = {"strategy": strategy, "restored": restored, "seconds": seconds, "outcome": outcome}
        reason = None if outcome == "ready" else f"Because of [red]{number}[/red]\x1b[31m."
        found.append(record(**changes, at=f"2026-11-20T09:0{number}:00+00:00", phases=spans, reason=reason))
        records.keep(found[-1], records.local_directory())
    return found


def test_boots_show_a_line_each_and_what_is_typical_of_each_kind(run: Run, kept: list[BootRecord]) -> None:
    """Oldest first; the phases and what went wrong below; medians of boots that got ready undisturbed."""
    done = run()
    lines = done.stdout.splitlines()
    heads = [line for line in lines if line.startswith("1")]

    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in heads] == [one.id for one in kept]
    assert heads[2].split()[1:] == ["2026-11-20", "09:02", "qwen3-8b", "2", "x", "H200", "gpu", "yes", "ready", "8.0"]
    assert "    queue 1.5  checks [bold] 38.5  (+12.5 once, in the snapshot)" in lines
    assert "    Because of [red]4[/red] [31m." in lines
    typical = [line for line in lines if "restored" in line and line.startswith("qwen3-8b")]
    assert typical[0].split() == [
        "qwen3-8b",
        "2",
        "x",
        "H200",
        "no",
        "gpu,",
        "restored",
        "2",
        "9.0",
        "8.0",
        "to",
        "10.0",
        "1",
        "0",
    ]
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("columns", ["20", "120", "250"])
def test_boots_fit_120_columns(run: Run, kept: list[BootRecord], columns: str) -> None:
    """Long names lose their middle; whatever the terminal's width."""
    long = {"model": "organisation/" + "a-long-name-" * 8, "gpu": "8 x RTX-PRO-6000", "at": "2026-11-21T00:00:00Z"}
    records.keep(record(**long, seconds=1800.0), records.local_directory())
    done = run(COLUMNS=columns)

    assert done.returncode == 0
    assert max(len(line) for line in done.stdout.splitlines()) <= 120
    assert "organisation/" in done.stdout
    assert "failed" in done.stdout


def test_boots_as_json_are_the_records(run: Run, kept: list[BootRecord]) -> None:
    """Whole, as one array, however narrow the terminal."""
    done = run("--json", COLUMNS="20")

    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [one.as_object() for one in kept]


def test_boots_with_html_are_a_page_too(run: Run, kept: list[BootRecord], tmp_path: Path) -> None:
    """Beside the table, or the JSON; the file is checked before anything is read."""
    file = tmp_path / "boots.html"
    done = run("--html", str(file), "--last", "2")

    assert (done.returncode, done.stderr) == (0, "")
    assert kept[-1].id in done.stdout
    drawn = file.read_text()
    assert [one.id in drawn for one in kept] == [False] * 4 + [True] * 2
    wrong = run("--html", str(tmp_path / "missing" / "boots.html"))
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "No such directory" in wrong.stderr


@pytest.mark.parametrize("count", [1, 2, 100])
def test_boots_with_last_are_the_newest(run: Run, kept: list[BootRecord], count: int) -> None:
    """All, where there are not so many."""
    shown = json.loads(run("--json", "--last", str(count)).stdout)

    assert [one["id"] for one in shown] == [one.id for one in kept[-count:]]


@pytest.mark.parametrize("arguments", [("--last", "0"), ("--last", "x"), ("superfluous",), ("--html",), ("--png", "x")])
def test_boots_used_wrongly_end_with_2(run: Run, arguments: tuple[str, ...]) -> None:
    """On stderr."""
    done = run(*arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def test_boots_where_none_were_say_where_they_would_come_from(run: Run, tmp_path: Path) -> None:
    """One sentence, which is no error."""
    plain = run()

    assert (plain.returncode, plain.stderr, plain.stdout.count("\n")) == (0, "", 1)
    assert str(tmp_path / "state" / "vllm-service" / "boots") in plain.stdout
    assert "vllm-service up" in plain.stdout
    assert (run("--json").returncode, run("--json").stdout) == (0, "[]\n")


def test_boots_of_modal_without_an_account_say_what_to_do(run: Run) -> None:
    """An error and a hint, before anything is asked of the network."""
    done = run("--modal", MODAL_SERVER_URL="http://127.0.0.1:9")

    assert (done.returncode, done.stdout) == (1, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: Modal refused to open volume 'vllm-cache'")
    assert hint.startswith("hint: Run 'modal setup'")


def test_boots_of_this_machine_do_not_import_modal(run: Run, kept: list[BootRecord]) -> None:
    """A table is soon there."""
    program = """
import sys
from service.cli.main import app
app(["boots"], standalone_mode=False)
print(sorted({"modal", "huggingface_hub"} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)

    assert kept[0].id in done.stdout
    assert done.stderr == "[]\n"
