"""The command `vllm-service`: parse, call, print, exit code. Everything else is elsewhere, and imported when needed."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    name="vllm-service",
    help="Open language models behind an OpenAI-compatible API: on this machine, or deployed to Modal.",
    no_args_is_help=True,
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
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the engine's own output.")] = False,
) -> None:
    """Serve a model on this machine until Ctrl-C."""
    from service import local
    from service.screen import Terminal
    from service.settings import Settings

    settings = Settings.load()
    asked = model or (settings.model if "model" in settings.model_fields_set else None)
    with Terminal(local.log_file(settings.port), verbose) as terminal:
        local.serve(asked, settings, host, terminal, terminal.ready)


@app.command()
def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the registry: GPU, price, context, parsers, gated or not."""
    from service import screen
    from service.models import Registry
    from service.settings import Settings

    settings = Settings.load()
    screen.print_models(Registry.load(settings.models_file), settings.model, as_json)


def main() -> NoReturn:
    """Run the command line: exit code 0 ok, 1 failed, 2 wrong usage, 130 interrupted."""
    from service.errors import ServiceError

    try:
        app(standalone_mode=True)
    except ServiceError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    sys.exit(0)


if __name__ == "__main__":
    main()
