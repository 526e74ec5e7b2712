"""Which service a word is about: nothing of this machine is shown or changed where another one was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.cli import main
from service.errors import UsageError
from tests.unit.cli.test_words import OPTIONS, WORDS, example

ASKERS = [
    "service.cli.cloud.deployed_gateway",
    "service.cli.batch._on_modal",
    "service.modal_app.client.boots",
    "service.modal_app.client.prefetch",
    "service.modal_app.client.usage_database",
]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the words a home and a state directory of their own."""
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("MODAL_ENVIRONMENT", "main")  # a word sets it, so it must be undone
    for name in ("SERVICE_DATABASE_URL", "VLLM_GATEWAY_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "in.jsonl").write_text('{"messages": [{"role": "user", "content": "Hello!"}]}\n')


def refused(*arguments: str) -> str:
    """Run a word, insist that it is refused as wrong usage, and return the reason."""
    done = CliRunner().invoke(main.app, arguments)
    assert isinstance(done.exception, UsageError), (done.output, done.exception)
    assert done.stdout == ""
    return done.exception.message


@pytest.mark.parametrize(
    ("word", "option"), [(word, option) for word in WORDS for option in ("--env", "--url") if option in OPTIONS[word]]
)
def test_option_that_names_a_place_is_refused_empty(word: str, option: str) -> None:
    """As of a variable of the shell that is not set."""
    assert refused(*word.split(), option, "").startswith(f"{option} '' is empty")


@pytest.mark.parametrize("word", [word for word in WORDS if {"--modal", "--env"} <= OPTIONS[word]])
def test_environment_of_modal_says_that_modal_is_meant(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does so without --modal, and --url is another place."""
    asked = []

    def ask(*_: Any, **__: Any) -> None:
        asked.append(word)
        raise KeyboardInterrupt

    for asker in ASKERS:
        monkeypatch.setattr(asker, ask)
    given = [*(part for part in example(word) if part != "--modal"), "--env", "production"]

    done = CliRunner().invoke(main.app, given)
    assert (done.stdout, asked) == ("", [word]), (done.output, done.exception)
    if "--url" in OPTIONS[word]:
        message = refused(*given, "--url", "http://127.0.0.1:9")
        assert message == "--url and --env name two different gateways."
        assert asked == [word]


@pytest.mark.parametrize("word", [word for word in WORDS if "--url" in OPTIONS[word] if word != "litellm"])
def test_url_with_a_secret_is_refused_and_not_repeated(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word that asks a gateway prints its URL."""
    monkeypatch.setenv("VLLM_API_KEY", "sk-1")
    given = [part for part in example(word) if part != "--modal"]
    message = refused(*given, "--url", "http://alice:s3cret@127.0.0.1:9")
    assert message.startswith("The gateway's URL has a user")
    assert "s3cret" not in message
