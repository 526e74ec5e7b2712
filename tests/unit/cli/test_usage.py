"""`vllm-service usage` and `vllm-service keys` on this machine, from the command line to the database and back."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.cli import main
from service.errors import UsageError
from service.keys import digest
from service.usage.database import local_file, open_database
from service.usage.ledger import insertion
from service.usage.records import UsageRecord

DAY_S = 86_400.0
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the state directory of this machine, which is the test's."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("SERVICE_DATABASE_URL", raising=False)
    return tmp_path


def say(*words: str) -> str:
    """Run the command, and return what it prints on stdout."""
    done = CliRunner().invoke(main.app, words)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def recorded(*changes: dict[str, Any]) -> None:
    """Record requests."""
    facts: dict[str, Any] = {"at": time.time(), "key": "alice", "model": "tiny", "seconds": 2.0, "status": 200}
    database = open_database(file=local_file())
    database.write(*insertion("w", {number: UsageRecord(**(facts | one)) for number, one in enumerate(changes)}))
    database.close()


def test_usage_is_shown_by_key_model_and_day_as_table_json_and_csv() -> None:
    """`--since` leaves out what was before; the table ends with the sum."""
    used = {"tokens_in": 10, "tokens_cached": 4, "tokens_out": 5, "cost": 0.5, "dollars": 0.5}
    recorded(used, {**used, "key": "bob", "model": "other"}, {**used, "at": time.time() - 3 * DAY_S})

    rows = json.loads(say("usage", "--json"))["rows"]
    assert [(row["name"], row["requests"], row["tokens_cached"]) for row in rows] == [("alice", 2, 8), ("bob", 1, 4)]
    rows = json.loads(say("usage", "--by", "model", "--since", "1d", "--json"))["rows"]
    assert {row["name"]: row["dollars"] for row in rows} == {"tiny": 0.5, "other": 0.5}
    days = list(csv.DictReader(io.StringIO(say("usage", "--by", "day", "--csv"))))
    assert [day["requests"] for day in days] == ["1", "2"]
    assert days[0]["day"] < days[1]["day"]
    assert say("usage").splitlines()[-1].split()[:2] == ["total", "3"]


def test_usage_without_requests_says_so() -> None:
    """It is no error."""
    assert "No requests are recorded yet." in say("usage")


def test_key_is_printed_once_and_its_changes_are_shown() -> None:
    """The list and the database never have it."""
    key = say("keys", "new", "carol", "--requests-per-minute", "60", "--model", "tiny").strip()
    (made,) = json.loads(say("keys", "list", "--json"))["keys"]
    assert (made["name"], made["limits"]) == ("carol", {"requests_per_minute": 60, "models": ["tiny"]})
    say("keys", "limit", "carol", "--requests-per-minute", "0", "--tokens-per-day", "1000")
    second = say("keys", "rotate", "carol", "--grace", "1h").strip()
    (changed,) = json.loads(say("keys", "list", "--json"))["keys"]
    assert (len(changed["keys"]), changed["limits"]) == (2, {"tokens_per_day": 1000, "models": ["tiny"]})
    say("keys", "revoke", "carol")

    shown = say("keys", "list")
    assert "revoked" in shown
    content = b"".join(file.read_bytes() for file in local_file().parent.iterdir())
    assert digest(key.encode()).encode() in content
    for one in (key, second):
        assert one.startswith("sk-")
        assert one not in shown
        assert one.encode() not in content


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model", "tiney"], "models: Unknown model 'tiney'. Did you mean 'tiny'?"),
        (["--model", "tiny", "--model", "all"], "--model tiny --model all: 'all' goes with no other."),
        (["--model", ""], "--model '' is empty"),
        (["--expires", ""], "--expires '' is empty"),
        (["--expires", "0d"], "'expires' is 2"),
        (["--expires", "2020-01-31"], "'expires' is 2020-01-31, which is not in the future"),
    ],
)
@pytest.mark.parametrize("word", ["new", "limit"])
def test_limit_that_makes_a_key_useless_or_unlimited_is_refused(word: str, options: list[str], reason: str) -> None:
    """Nothing is made or changed."""
    say("keys", "new", "alice", "--model", "tiny", "--model", "some-org/some-model")
    before = say("keys", "list", "--json")

    done = CliRunner().invoke(main.app, ["keys", word, "alice" if word == "limit" else "bob", *options])
    assert isinstance(done.exception, UsageError), (done.output, done.exception)
    assert done.exception.message.startswith(reason)
    assert say("keys", "list", "--json") == before


def shell(tmp_path: Path, line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of the shell that begins with a word of the command."""
    environ = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    line = f"{sys.executable} -m service.cli.main {line}"
    return subprocess.run(
        ["/bin/bash", "-c", line], env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_key_is_not_made_where_standard_output_is_closed(state: Path) -> None:
    """It would be shown to nobody, and the old one would have ended."""
    say("keys", "new", "carl")
    before = say("keys", "list", "--json")

    for words in ("keys rotate carl --grace 0 >&-", "keys new dora --json >&-"):
        done = shell(state, words)
        assert done.returncode == 1
        assert done.stderr.startswith("error: Standard output is closed, and the key is shown there this once: nothing")
    assert say("keys", "list", "--json") == before
    assert shell(state, "keys revoke carl >&-").returncode == 0


@pytest.mark.parametrize(
    ("words", "again"),
    [
        ("new dora", "rotate dora --grace 0"),
        ("new dora --json", "rotate dora --grace 0"),
        ("rotate carl --grace 7d", "rotate carl --grace 604800s"),
    ],
)
def test_key_that_cannot_be_shown_is_replaced_by_what_the_error_says(state: Path, words: str, again: str) -> None:
    """The key before it stays valid as long as was asked."""
    say("keys", "new", "carl")

    done = shell(state, f"keys {words} >/dev/full")
    assert (done.returncode, done.stderr.splitlines()) == (
        1,
        [
            f"error: The key of '{words.split()[1]}' was made and could not be shown: No space left on device.",
            f"hint: Make another: vllm-service keys {again}",
        ],
    )
    assert say("keys", *again.split()).startswith("sk-")
