"""The command `vllm-service`: parse, call, print, exit code. Everything else is elsewhere, and imported when needed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    name="vllm-service",
    help="Open language models behind an OpenAI-compatible API: on this machine, or deployed to Modal.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root() -> None:
    """Open language models behind an OpenAI-compatible API: on this machine, or deployed to Modal."""


@app.command()
def up(
    model: Annotated[str | None, typer.Argument(help="Registry key, hub id, or directory of a model.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; other than loopback needs API_KEY.")] = "127.0.0.1",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what engine and installer print.")] = False,
) -> None:
    """Serve a model on this machine until Ctrl-C."""
    from service.cli.terminal import Terminal
    from service.local import serve
    from service.settings import Settings

    settings = Settings.load()
    requested = model or (settings.model if "model" in settings.model_fields_set else None)
    with Terminal(serve.log_file(settings.port), verbose) as terminal:
        serve.serve(requested, settings, host, terminal, terminal.ready)


@app.command()
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


@app.command()
def prefetch(  # noqa: PLR0917 - every one is an option with a name
    names: Annotated[list[str] | None, typer.Argument(metavar="MODEL...", help="Registry keys or hub ids.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every model of the registry.")] = False,
    modal: Annotated[bool, typer.Option("--modal", help="Into Modal's volume, without a GPU; else here.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Fetch nothing: check every file's checksum.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Remove fetched revisions that no entry names.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Newest commit where an entry names none.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fetch the weights of models before they are needed, and verify them."""
    from service.cli import prefetch as cli_prefetch
    from service.settings import Settings
    from service.weights import prefetch as weights_prefetch
    from service.weights import revisions

    settings = Settings.load()
    registry = revisions.registry(settings.models_file)
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
        from service.modal_app import client

        events = client.prefetch(request, settings)
    else:
        events = weights_prefetch.prefetch(request)
    try:
        cli_prefetch.follow(request, events, as_json, on_modal=modal)
    except KeyboardInterrupt:
        typer.echo("Stopped. What was finished is kept; the same command goes on from there.", err=True)
        raise typer.Exit(130) from None


@app.command()
def boots(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    modal: Annotated[bool, typer.Option("--modal", help="Of the deployed service, not of this machine.")] = False,
    last: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the newest N.")] = None,
) -> None:
    """Show what the boots of replicas took, phase by phase, and compare the strategies."""
    from service.boots import records
    from service.cli import boots as cli_boots

    if modal:
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


@app.command()
def litellm(
    url: Annotated[
        str | None,
        typer.Option(envvar="VLLM_GATEWAY_URL", help="Of the gateway; else that of 'up'. os.environ/NAME: from there."),
    ] = None,
    gpus: Annotated[
        list[str] | None, typer.Option("--gpu", metavar="GPU", help="A further tier, such as H200; repeatable.")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="<key>-local too, tuned for tool calls.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, not YAML.")] = False,
) -> None:
    """Print the configuration of a LiteLLM proxy: every model as <key> and <key>-<gpu>, one URL, one key."""
    from service.cli import litellm
    from service.settings import Settings
    from service.weights import revisions

    settings = Settings.load()
    registry = revisions.registry(settings.models_file)
    config = litellm.config(registry, url or f"http://127.0.0.1:{settings.port}", settings, gpus or (), local=local)
    if left_out := litellm.too_large(registry, gpus or ()):
        typer.echo(f"Left out, the weights alone are larger than the GPU: {', '.join(left_out)}", err=True)
    text = litellm.as_json(config) if as_json else litellm.as_yaml(config)
    if output is None:
        typer.echo(text, nl=False)
        return
    litellm.write(text, output)
    typer.echo(f"Wrote {output}: {len(config['model_list'])} names", err=True)


def main() -> NoReturn:
    """Run the command line: exit code 0 ok, 1 failed, 2 wrong usage, 130 interrupted."""
    from service.errors import ServiceError

    try:
        app(standalone_mode=True)
    except ServiceError as error:
        sys.stderr.write(error.to_terminal() + "\n")
        sys.exit(error.exit_code)
    sys.exit(0)


if __name__ == "__main__":
    main()
