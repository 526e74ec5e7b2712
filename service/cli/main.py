"""The command `vllm-service`: parse, call, print, exit code. Everything else is elsewhere, and imported when needed."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from service import interrupts
from service.cli import batch, cloud, completion, connections, doctor, keys, measure, operations, plan

if TYPE_CHECKING:
    from service.errors import ServiceError

app = typer.Typer(
    name="vllm-service",
    help="Open language models behind an OpenAI-compatible API: on this machine, or deployed to Modal.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from service import __version__

        typer.echo(f"vllm-service {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Open language models behind an OpenAI-compatible API: on this machine, or deployed to Modal."""
    from service.errors import ServiceError
    from service.files import expand_user

    # `~` stays where there is neither a variable nor an entry in the user database, as for a container's bare user id.
    home = os.environ.get("HOME")
    if home == "" or not expand_user("~").is_absolute():
        given = "HOME is not set and this user has no home directory"
        if home is not None:
            given = f"HOME='{home}' is no absolute path"
        raise ServiceError(
            f"{given}, so there is no place for caches and records.",
            hint="Set HOME to a directory that you may write to.",
        )


@app.command(epilog="Example: vllm-service up qwen3-0.6b")
def up(
    model: Annotated[
        str | None,
        typer.Argument(help="Registry key, hub id, or directory of a model.", autocompletion=completion.models),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; other than loopback needs API_KEY.")] = "127.0.0.1",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what engine and installer print.")] = False,
) -> None:
    """Serve a model on this machine until Ctrl-C."""
    from service.cli.streams import lossy
    from service.cli.terminal import Terminal
    from service.local import serve
    from service.settings import Settings

    sys.stdout = lossy(sys.stdout)
    settings = Settings.load()
    requested = model or (settings.model if "model" in settings.model_fields_set else None)
    with Terminal(serve.log_file(settings.port), verbose) as terminal:
        serve.serve(requested, settings, host, terminal, terminal.ready)


@app.command(epilog="Example: vllm-service models --json")
def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    outdated: Annotated[bool, typer.Option("--outdated", help="Ask the hub which have newer commits.")] = False,
    pin: Annotated[bool, typer.Option("--pin", help="Write the hub's commits of unpinned models to the lock.")] = False,
) -> None:
    """List the registry: GPU, price, context, parsers, gated or not."""
    from service.errors import UsageError
    from service.settings import Settings
    from service.weights import revisions

    if pin and outdated:
        raise UsageError("--pin and --outdated are two different questions.", hint="Give one of them.")
    settings = Settings.load()
    registry = revisions.registry(settings.models_file)
    if pin:
        from service.cli import pins as cli_pins
        from service.weights import pinning

        pinned = pinning.pin(registry, settings.models_file)
        cli_pins.show(pinned, as_json)
        return
    if outdated:
        from service.cli import outdated as cli_outdated
        from service.weights.outdated import compare

        cli_outdated.show(compare(registry), as_json)
        return
    from service.cli.models import print_models

    print_models(registry, settings.model, as_json)


@app.command(epilog="Example: vllm-service prefetch qwen3-8b --modal")
def prefetch(  # noqa: PLR0917 - every one is an option with a name
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL...", help="Registry keys or hub ids.", autocompletion=completion.models),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every model of the registry.")] = False,
    modal: Annotated[bool, typer.Option("--modal", help="Into Modal's volume, without a GPU; else here.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Fetch nothing: check every file's checksum.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Remove fetched revisions that no entry names.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Newest commit where an entry names none.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    env: cloud.Env = None,
) -> None:
    """Fetch and verify the weights of models, before they are needed."""
    from service.cli import prefetch as cli_prefetch
    from service.settings import Settings
    from service.weights import prefetch as weights_prefetch
    from service.weights import revisions

    settings, modal = Settings.load(), cloud.is_meant(modal, env)
    registry = revisions.registry(settings.models_file)
    if prune and not modal:
        from service.local.adapter_file import with_kept_adapters

        registry = with_kept_adapters(registry)
    request = weights_prefetch.build_request(
        names or [],
        registry,
        settings.models_file,
        everything=everything,
        on_modal=modal,
        verify=verify,
        prune=prune,
        update=update,
    )
    if modal:
        cloud.use_modal(env)
        from service.modal_app import client

        events = client.prefetch(request, settings)
    else:
        events = weights_prefetch.prefetch(request)
    try:
        with contextlib.closing(events):
            cli_prefetch.follow(request, events, as_json, on_modal=modal)
    except KeyboardInterrupt:
        typer.echo("Stopped. What was finished is kept; the same command goes on from there.", err=True)
        raise typer.Exit(130) from None


@app.command(epilog="Example: vllm-service boots --modal --last 10")
def boots(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    modal: Annotated[bool, typer.Option("--modal", help="Of the deployed service, not of this machine.")] = False,
    last: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the newest N.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Draw timelines, as a page for a browser.")
    ] = None,
    env: cloud.Env = None,
) -> None:
    """Show what boots of replicas took, phase by phase. Strategies are compared below."""
    from service.boots import records
    from service.cli import boots as cli_boots
    from service.files import require_writable

    if html:
        require_writable(html)
    modal = cloud.is_meant(modal, env)
    if modal:
        cloud.use_modal(env)
        from service.modal_app import client
        from service.settings import Settings

        prefix = Settings.load().volume_prefix
        found = client.boots(prefix)
        place = (
            f"Modal's volume '{client.boots_volume(prefix)}': every replica of a deployed service records its own there"
        )
    else:
        found = records.load(records.local_directory())
        place = (
            f"{records.local_directory()}: 'vllm-service up' records its own there (--modal: the deployed service's)"
        )
    found = found[-last:] if last else found
    cli_boots.print_boots(found, f"No boots are recorded yet in {place}.", as_json)
    if html:
        cli_boots.write_page(found, "the deployed service" if modal else "this machine", html)


@app.command(epilog="Example: vllm-service usage --by model --since 7d --csv")
def usage(  # noqa: PLR0917 - every one is an option with a name
    by: Annotated[str, typer.Option(metavar="key|model|day", help="What a row is.")] = "key",
    since: Annotated[str | None, typer.Option(metavar="WHEN", help="A date, or such as 36h or 7d.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    modal: Annotated[bool, typer.Option("--modal", help="Of the deployed service, not of this machine.")] = False,
    env: cloud.Env = None,
) -> None:
    """Show who used how much, and what it cost."""
    from datetime import UTC, datetime

    from service.cli import usage as cli_usage
    from service.settings import Settings, database_url
    from service.usage import ledger, report, writer_files
    from service.usage.database import open_database

    column, begin = report.parse_by(by), report.parse_since(since, datetime.now(UTC)) if since else None
    url = database_url(os.environ)
    if cloud.is_meant(modal, env) and not url:
        cloud.use_modal(env)
        from service.modal_app import client

        database, interval_s = client.usage_database(Settings.load().volume_prefix), writer_files.INTERVAL_S
    else:
        database, interval_s = open_database(url), ledger.INTERVAL_S
    with contextlib.closing(database):
        cli_usage.print_usage(database, column, begin, interval_s, as_json=as_json, as_csv=as_csv)


cloud.register(app)
operations.register(app)
measure.register(app)
batch.register(app)
connections.register(app)
plan.register(app)
doctor.register(app)
app.add_typer(keys.app, name="keys")


def main() -> NoReturn:
    """Run the command line: exit code 0 ok, 1 failed, 2 wrong usage, 130 interrupted."""
    from service.cli import streams

    streams.prepare()
    try:
        code = _run()
        sys.stdout.flush()
    except OSError as error:
        if not streams.is_of_output(error):
            raise
        streams.give_up(error)
        code = 1
    # The last sentence is said. Calls of Modal's client that nobody waits for end by errors as the interpreter ends.
    logging.getLogger("asyncio").disabled = True
    sys.exit(130 if interrupts.came() else code)


def _run() -> int | str | None:
    from service.errors import ServiceError

    try:
        app(standalone_mode=True)
    except SystemExit as end:
        return end.code
    except ServiceError as error:
        return _failed(error)
    except KeyboardInterrupt:  # before typer handles it: as it builds the commands
        return 130
    except OSError as error:
        if error.filename is None:
            raise
        message = f"'{error.filename}' cannot be used: {error.strerror}."
        variables = "HF_HOME, XDG_CACHE_HOME, XDG_STATE_HOME, TMPDIR"
        hint = f"Give this user access to it and room on its disk, or name another directory: {variables}."
        return _failed(ServiceError(message, hint=hint))
    return 0


def _failed(error: ServiceError) -> int:
    sys.stderr.write(error.to_terminal() + "\n")
    return error.exit_code


if __name__ == "__main__":
    main()
