"""The word `doctor`: what is wrong here and at Modal, one line a check. Parse, call, print."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from service.cli import modal_client
from service.cli.cloud import Env, Json, modal_word

if TYPE_CHECKING:
    from service.local.checks import Finding

_INDENT = " " * 8


def register(app: typer.Typer) -> None:
    """Add the word to the command."""
    app.command(epilog="Example: vllm-service doctor --json")(doctor)


def doctor(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="A log or an error to explain instead; - is standard input.", allow_dash=True
        ),
    ] = None,
    as_json: Json = False,
    env: Env = None,
) -> None:
    """Check machine, account and service, or explain a log. Ends with 1 if something failed."""
    with modal_word(env):
        found = []
        for finding in _of_file(file) if file else _of_all():
            found.append(finding)
            if not as_json:
                typer.echo(_line(finding))
        if as_json:
            from dataclasses import asdict

            from service.cli.terminal import print_json

            print_json([asdict(finding) for finding in found])
        if any(finding.state == "failed" for finding in found):
            raise typer.Exit(1)


def _of_all() -> Iterator[Finding]:
    from service.errors import ServiceError
    from service.local import checks

    yield from checks.run(checks.of_this_machine())
    try:
        modal_client.load()
    except ServiceError as error:
        yield checks.Finding("account", "failed", error.message, error.hint)
        return
    from service.modal_app import account_checks  # importing Modal's client takes longer than all before

    yield from account_checks.findings()


def _of_file(file: Path) -> Iterable[Finding]:
    from service.errors import UsageError
    from service.local import checks

    if str(file) == "-":
        return checks.of_text(sys.stdin)
    if not file.is_file():
        raise UsageError(f"'{file}' is no file.", hint="Give a file with a log, or - for standard input.")
    opened: TextIO
    with file.open(errors="replace") as opened:
        return checks.of_text(opened)


def _line(finding: Finding) -> str:
    """Return a finding as one line; a terminal gets it wrapped."""
    text = f"{finding.state:<8}{finding.check}: {finding.text}"
    if finding.next:
        text += f" Next: {finding.next}"
    if not sys.stdout.isatty():
        return text
    return textwrap.fill(text, shutil.get_terminal_size().columns, subsequent_indent=_INDENT, break_long_words=False)
