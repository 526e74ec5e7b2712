"""Connects a client: asks the gateway for the model, and writes or prints what the client needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from service.cli import client_configs, config_files, litellm
from service.cli.client_configs import Connection
from service.cli.clients import Client
from service.cli.cloud import say
from service.cli.config_files import Change
from service.cli.gateways import Gateway
from service.cli.terminal import print_json
from service.errors import UsageError
from service.files import require_writable
from service.modal_app import gateway_check
from service.modal_app.gateway_access import KEY_VARIABLE
from service.settings import Settings
from service.weights import revisions

_TITLES = {
    Client.CODEX: "Codex",
    Client.CLAUDE: "Claude Code",
    Client.OPENCODE: "opencode",
    Client.OPENWEBUI: "Open WebUI",
    Client.LITELLM: "LiteLLM",
}
_TOLD_THE_CONTEXT = {Client.CODEX, Client.CLAUDE, Client.OPENCODE}


@dataclass(frozen=True)
class ConnectRequest:
    """What is asked for.

    Attributes:
        model: As requests name it.
        output: The file; None: the client's own, or standard output where it has none.
        only_print: Write no file.
    """

    client: Client
    gateway: Gateway
    model: str
    output: Path | None
    only_print: bool


def run(request: ConnectRequest, settings: Settings, *, yes: bool, as_json: bool) -> None:
    """Write the configuration, or print it.

    Raises:
        ServiceError: The gateway did not answer, or a file cannot be used.
    """
    client, gateway = request.client, request.gateway
    timeout_s = settings.hold_s + settings.request_timeout_s
    file = request.output or client_configs.own_file(client)
    written = None if request.only_print else file
    if written:
        _check_output(request, written)
    is_asked = client in _TOLD_THE_CONTEXT or (written and client is not Client.LITELLM)  # that has every model
    context = _context(request) if is_asked else None
    to = Connection(gateway.url, gateway.needs_key, request.model, context, timeout_s)
    if client is Client.LITELLM:
        wanted = litellm.config(revisions.registry(settings.models_file), gateway.url, settings)
    else:
        wanted = client_configs.values(client, to, is_new=not (file and file.exists()))
    change = None
    if written:
        change = _change(request, wanted, written)
    elif not as_json:
        typer.echo(
            litellm.as_yaml(wanted) if client is Client.LITELLM else client_configs.text(client, wanted), nl=False
        )
    backup = write(change, _note(request, change), yes=yes) if change else None
    if as_json:
        print_json(
            {
                "client": client.value,
                "url": gateway.url,
                "model": request.model,
                "file": str(change.file) if change else None,
                "backup": str(backup) if backup else None,
                "configuration": wanted,
            }
        )
    elif change is None and gateway.needs_key and not gateway.key:
        say(f"{KEY_VARIABLE} is not set: set it to a key of {gateway.url}.")


def write(change: Change, note: str, *, yes: bool) -> Path | None:
    """Write a file and say so; return the backup of what was there.

    Raises:
        ServiceError: The answer to the question was no, or it cannot be written.
    """
    if not change.is_needed:
        say(f"{change.file} has it already.\n{note}")
        return None
    backup = config_files.settle(change, yes=yes)
    say(f"Wrote {change.file}" + (f"\nAs it was: {backup}" if backup else "") + f"\n{note}")
    return backup


def _context(request: ConnectRequest) -> int | None:
    """Return the context of the model as the gateway tells it, which is how a wrong key or name is found."""
    found = gateway_check.model(request.gateway.url, request.gateway.key, request.model)
    if found.get("reason"):
        say(f"The gateway lists {request.model}, but cannot serve it: {found['reason']}")
    context = found.get("max_model_len")
    return int(context) if context else None


def _check_output(request: ConnectRequest, file: Path) -> None:
    """Insist that a file can be written, and that there is a key for one that holds it."""
    if request.output:
        require_writable(file, is_replaced=True)
    client, gateway = request.client, request.gateway
    holds_key = client is not Client.LITELLM and client_configs.own_file(client) is None
    if holds_key and gateway.needs_key and not gateway.key:
        raise UsageError(
            f"{KEY_VARIABLE} is not set, and {file} holds the key itself.", hint=f"Set it to a key of {gateway.url}."
        )


def _change(request: ConnectRequest, wanted: dict[str, Any], file: Path) -> Change:
    if request.client is Client.LITELLM:
        return litellm.change(wanted, file)
    return client_configs.change(request.client, wanted, file, request.gateway.key)


def _note(request: ConnectRequest, change: Change | None) -> str:
    who = "Who reads it" if request.client is Client.ENV else _TITLES[request.client]
    what = "all models of" if request.client is Client.LITELLM else f"{request.model} at"
    note = f"{who} asks {what} {request.gateway.url}"
    if change and change.has_secret:
        return f"{note}.\nThe key is in the file, which its owner alone can read."
    return f"{note},\nwith the key in {KEY_VARIABLE}." if request.gateway.needs_key else f"{note}."
