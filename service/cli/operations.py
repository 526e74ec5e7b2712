"""The words of the command for a running service: test, warm, logs. Parse and call, no more."""

from __future__ import annotations

from typing import Annotated

import typer

from service.cli import completion
from service.cli.cloud import Env, Json, deployed_gateway, is_meant, load_settings, modal_word, not_empty

Gpu = Annotated[
    str | None,
    typer.Option("--gpu", metavar="G[:n]", help="Its tier; else the model's own.", autocompletion=completion.gpus),
]


def register(app: typer.Typer) -> None:
    """Add the words to the command."""
    app.command(epilog="Example: vllm-service test --model qwen3-8b --gpu H200")(test)
    app.command(epilog="Example: vllm-service warm qwen3-8b --weekdays 8:00-18:00 --tz Europe/Berlin")(warm)
    app.command(epilog="Example: vllm-service logs qwen3-8b --tail 20")(logs)


def logs(  # noqa: PLR0917 - every one is an option with a name
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Of its replicas; else the gateway's.", autocompletion=completion.models),
    ] = None,
    gpu: Gpu = None,
    newest: Annotated[int, typer.Option("--tail", min=0, max=20_000, metavar="N", help="Lines from before.")] = 100,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Go on until Ctrl-C.")] = True,
    as_json: Json = False,
    env: Env = None,
) -> None:
    """Follow the log of the gateway, or of a model's replicas."""
    with modal_word(env):
        settings = load_settings([model] if model else (), gpu)
        from service.cli import logs as cli_logs
        from service.modal_app import deployed
        from service.modal_app import logs as modal_logs

        names = deployed.Names(settings)
        target = names.target(model, gpu) if model or gpu else None
        app = deployed.find(names, target).app
        key = target.model.key if target and target.model else None
        cli_logs.show(modal_logs.lines(app, key, newest, follow=follow), as_json)


def test(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="M", help="Else the service's default, 'llm'.", autocompletion=completion.models
        ),
    ] = None,
    gpu: Gpu = None,
    url: Annotated[
        str | None,
        typer.Option("--url", metavar="URL", help="Another service's, such as that of 'up'.", callback=not_empty),
    ] = None,
    as_json: Json = False,
    env: Env = None,
) -> None:
    """Test a service as its clients use it; this wakes a GPU. The key is in VLLM_API_KEY."""
    from service.errors import UsageError
    from service.modal_app.gateway_access import api_key

    key = api_key()
    if is_meant(not url, env, url) and not key:
        raise UsageError(
            "VLLM_API_KEY is not set, and the gateway answers nobody without a key.",
            hint="Set it to one of your keys; 'vllm-service deploy' has shown the first.",
        )
    with modal_word(env):
        settings = load_settings([model] if model and not url else (), gpu)
        url = url or deployed_gateway()
        from service.cli import service_test

        service_test.run(service_test.service_at(url, key, model, gpu, settings), as_json)


def warm(  # noqa: PLR0917 - every one is an option with a name
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Without one: list.", autocompletion=completion.models)
    ] = None,
    duration: Annotated[str | None, typer.Option("--for", metavar="TIME", help="From now on: 30m, 2h.")] = None,
    weekdays: Annotated[str | None, typer.Option("--weekdays", metavar="SPAN", help="Mon to Fri: 8:00-18:00.")] = None,
    tz: Annotated[str | None, typer.Option("--tz", metavar="ZONE", help="Of --weekdays: Europe/Berlin.")] = None,
    end: Annotated[bool, typer.Option("--end", help="End the model's schedule.")] = False,
    gpu: Gpu = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
    env: Env = None,
) -> None:
    """Keep a replica of a model up by schedule; without MODEL, list."""
    from service.errors import UsageError

    given = [duration is not None, weekdays is not None, end]
    if sum(given) != (model is not None) or (tz and not weekdays):
        raise UsageError(
            "A schedule has a model, and one of --for, --weekdays and --end; --tz goes with --weekdays.",
            hint="For example: vllm-service warm qwen3-8b --for 30m.",
        )
    from service.modal_app import warm_schedule

    seconds = warm_schedule.parse_duration(duration) if duration else None
    span = warm_schedule.parse_weekdays(weekdays, tz) if weekdays else None
    with modal_word(env):
        settings = load_settings([model] if model else (), gpu)
        from service.cli import warm as cli_warm
        from service.modal_app import deployed

        names = deployed.Names(settings)
        if model is None:
            cli_warm.show(names, as_json)
        elif end:
            cli_warm.end(names, names.target(model, gpu), as_json)
        else:
            cli_warm.begin(names, names.target(model, gpu), seconds, span, yes=yes, as_json=as_json)
