"""The words of the command for the clients of a gateway: connect, litellm, chat. Parse and call, no more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.cli import completion
from service.cli.clients import Client
from service.cli.cloud import Env, Json, is_meant, load_settings, modal_word, not_empty

Modal = Annotated[bool, typer.Option("--modal", help="The deployed service, not this machine's.")]
Url = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="Another gateway; else VLLM_GATEWAY_URL.", callback=not_empty),
]


def register(app: typer.Typer) -> None:
    """Add the words to the command."""
    app.command(epilog="Example: vllm-service connect codex --model qwen3-8b")(connect)
    app.command(epilog="Example: vllm-service litellm --gpu H200")(litellm)
    app.command(epilog="Example: echo 'What is a GPU?' | vllm-service chat qwen3-8b --modal")(chat)


def connect(  # noqa: PLR0917 - every one is an option with a name
    client: Annotated[Client, typer.Argument(metavar="CLIENT", help="Whose configuration.")],
    model: Annotated[
        str, typer.Option("--model", metavar="M", help="What it asks for.", autocompletion=completion.models)
    ] = "llm",
    only_print: Annotated[bool, typer.Option("--print", help="Print it, and write nothing.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it there; else its own file.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    modal: Modal = False,
    url: Url = None,
    as_json: Json = False,
    env: Env = None,
) -> None:
    """Write a client's configuration, or print it. The key is in VLLM_API_KEY."""
    from service.errors import UsageError

    if only_print and output:
        raise UsageError("--print and --output were both given.", hint="Give one of them.")
    with modal_word(env):
        settings = load_settings()
        from service.cli import connect as cli_connect
        from service.cli import gateways

        gateway = gateways.find(url, is_meant(modal, env, url), settings)
        request = cli_connect.ConnectRequest(client, gateway, model, output, only_print)
        cli_connect.run(request, settings, yes=yes, as_json=as_json)


def chat(  # noqa: PLR0917 - every one is an option with a name
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="Else the default, 'llm'.", autocompletion=completion.models)
    ] = "llm",
    system: Annotated[str, typer.Option("--system", metavar="TEXT", help="The system prompt.")] = "",
    images: Annotated[
        list[Path] | None, typer.Option("--image", metavar="FILE", help="Sent with the first question; repeatable.")
    ] = None,
    modal: Modal = False,
    url: Url = None,
    as_json: Json = False,
    env: Env = None,
) -> None:
    """Talk to a model. A question from a pipe gets one answer. The key is in VLLM_API_KEY."""
    import sys

    from service.errors import UsageError

    if as_json and sys.stdin.isatty():
        raise UsageError(
            "--json answers one question, from standard input, which is a terminal.",
            hint="For example: echo Hello | vllm-service chat --json",
        )
    with modal_word(env):
        settings = load_settings()
        from service.cli import chat as cli_chat
        from service.cli import gateways

        conversation = cli_chat.Conversation(model, system)
        for file in images or ():
            conversation.add_image(file)
        gateway = gateways.find(url, is_meant(modal, env, url), settings)
        if sys.stdin.isatty():
            cli_chat.Chat(gateway, conversation).run()
        else:
            cli_chat.once(gateway, conversation, as_json)


def litellm(  # noqa: PLR0917 - every one is an option with a name
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="VLLM_GATEWAY_URL",
            help="Of the gateway; else that of 'up'. os.environ/NAME: from there.",
            callback=not_empty,
        ),
    ] = None,
    gpus: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu", metavar="GPU", help="A further tier, such as H200; repeatable.", autocompletion=completion.gpus
        ),
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="<key>-local too, tuned for tool calls.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it there.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, not YAML.")] = False,
) -> None:
    """Print the configuration of a LiteLLM proxy. Every model is in it, as <key> and <key>-<gpu>: one URL, one key."""
    from service.cli import connect, litellm
    from service.settings import Settings
    from service.weights import revisions

    settings = Settings.load()
    registry = revisions.registry(settings.models_file)
    config = litellm.config(registry, url or f"http://127.0.0.1:{settings.port}", settings, gpus or (), local=local)
    if left_out := litellm.too_large(registry, gpus or ()):
        typer.echo(f"Left out, the weights alone are larger than the GPU: {', '.join(left_out)}", err=True)
    if output is None:
        typer.echo(litellm.as_json(config) if as_json else litellm.as_yaml(config), nl=False)
        return
    connect.write(litellm.change(config, output, in_json=as_json), f"{len(config['model_list'])} names", yes=yes)
