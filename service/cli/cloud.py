"""The words of the command for a service at Modal: deploy, upload, list, url, stop, scale. Parse and call, no more."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service import interrupts
from service.cli import completion, modal_client

if TYPE_CHECKING:
    from service.settings import Settings


def not_empty(option: typer.CallbackParam, value: str | None) -> str | None:
    """Return the value of an option; an empty one is most often a variable of the shell that is not set.

    Raises:
        UsageError: It is empty. Taken as not given, it would choose another place, or no limit.
    """
    if value is not None and not value.strip():
        from service.errors import UsageError

        raise UsageError(
            f"{option.opts[0]} '{value}' is empty; expected {option.metavar}.",
            hint=f"Set the variable that it comes from, or leave {option.opts[0]} out.",
        )
    return value


Env = Annotated[
    str | None,
    typer.Option("--env", metavar="NAME", help="Modal's environment; else MODAL_ENVIRONMENT.", callback=not_empty),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the words to the command."""
    app.command(epilog="Example: vllm-service deploy qwen3-8b --gpu L40S --yes")(deploy)
    app.command(epilog="Example: vllm-service upload ./my-model --name support-bot")(upload)
    app.command("list", epilog="Example: vllm-service list --json")(list_apps)
    app.command(epilog='Example: curl $(vllm-service url)/models -H "Authorization: Bearer $VLLM_API_KEY"')(url)
    app.command(epilog="Example: vllm-service stop --gpu H200 --yes")(stop)
    app.command(epilog="Example: vllm-service scale qwen3-8b --min 1 --max 3")(scale)


def deploy(  # noqa: PLR0917 - every one is an option with a name
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="The first is what 'llm' means; else SERVICE_MODEL.",
            autocompletion=completion.models,
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="G[:n]", help="GPU and count, such as H200:2; else the models'.", autocompletion=completion.gpus
        ),
    ] = None,
    all_gpus: Annotated[bool, typer.Option("--all-gpus", help="A tier each: L40S, A100, H100, H200, B200.")] = False,
    per_model: Annotated[bool, typer.Option("--per-model", help="An app for each model alone.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the plan, change nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Boot again what is recorded as unable to, such as for want of memory.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="End with a chat, which wakes a GPU.")] = False,
    rollback: Annotated[bool, typer.Option("--rollback", help="Back to the versions before the last deploy.")] = False,
    as_json: Json = False,
    env: Env = None,
) -> None:
    """Publish tiers and gateway to Modal: only what has changed. Missing secrets and weights come first."""
    if rollback and (dry_run or check or retry):
        from service.errors import UsageError

        raise UsageError("--rollback goes with none of --dry-run, --check and --retry.", hint="Give one of them.")
    with modal_word(env, "Stopped. What was finished is kept; the same command goes on from there."):
        settings = load_settings(names or (), gpu)
        say("Checking the account, secrets and models")  # importing Modal's client takes longer than all before
        from service.cli import deploy as cli_deploy
        from service.modal_app import deploy as deploying
        from service.modal_app.deploy_plan import DeployRequest

        request = DeployRequest(tuple(names or ()), gpu, all_gpus, per_model)
        if rollback:
            cli_deploy.rolled_back(deploying.roll_back(request, settings, say), as_json)
            return
        cli_deploy.run(request, settings, yes=yes, dry_run=dry_run, retry=retry, check=check, as_json=as_json)


def upload(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A model or LoRA adapter, as safetensors.")],
    name: Annotated[
        str | None, typer.Option("--name", metavar="N", help="What entries call it; else the directory's name.")
    ] = None,
    as_json: Json = False,
    env: Env = None,
) -> None:
    """Put your own weights on Modal's volume, for entries to name. What is there already is not sent again."""
    with modal_word(env, "Stopped. What was sent is kept; the same command goes on from there."):
        settings = load_settings()
        from service.registry.models import Registry
        from service.weights import model_directory, uploads

        found, name = model_directory.read(directory), uploads.name_for(directory, name)
        uploads.check_entries(found, name, Registry.load(settings.models_file).specs.values())
        say(f"Uploading {directory} as '{name}'")  # importing Modal's client takes longer than all before
        from service.cli import upload as cli_upload

        cli_upload.run(found, name, settings, as_json)


def list_apps(as_json: Json = False, env: Env = None) -> None:
    """List the deployed apps: GPU, state, replicas, price, URL."""
    with modal_word(env):
        settings = load_settings()
        from service.cli import deployed as cli_deployed
        from service.modal_app import deployed

        cli_deployed.print_apps(deployed.apps(deployed.Names(settings)), as_json)


def url(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="GPU|MODEL", help="A tier's own URL, which takes a proxy token.", autocompletion=completion.targets
        ),
    ] = None,
    as_json: Json = False,
    env: Env = None,
) -> None:
    """Print the base URL of the gateway, or of a tier."""
    with modal_word(env):
        settings = load_settings()
        from service.cli import deployed as cli_deployed
        from service.modal_app import deployed

        names = deployed.Names(settings)
        target = None
        if name:
            target = names.target(None, name) if deployed.is_gpu(name) else names.target(name)
        cli_deployed.print_url(deployed.find(names, target), target, as_json)


def stop(  # noqa: PLR0917 - every one is an option with a name
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="End its replicas, or its own app.", autocompletion=completion.models),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="G[:n]", help="Stop this tier's app, or MODEL on it.", autocompletion=completion.gpus),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Stop the gateway and all tiers.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
    env: Env = None,
) -> None:
    """Stop apps for good, or end the replicas of a model."""
    from service.errors import UsageError

    if everything == bool(model or gpu):
        raise UsageError("Give a model, --gpu, or --all.", hint="'vllm-service list' shows what is deployed.")
    with modal_word(env):
        settings = load_settings([model] if model else (), gpu)
        from service.cli import deployed as cli_deployed
        from service.cli.terminal import confirm
        from service.modal_app import account, deployed, warm

        names, schedules = deployed.Names(settings), warm.Schedules(settings.volume_prefix)
        target = None if everything else names.target(model, gpu)
        found = deployed.apps(names) if target is None else [deployed.find(names, target)]
        if target and target.model and found[0].app.name == target.app:  # which other models share
            warm.end(schedules, {target.app}, target.model.key)  # else it would start one again
            ended = deployed.end_replicas(found[0], target, settings.scaledown_window)
            cli_deployed.print_ended(target, *ended, as_json)
            return
        stopped = [one.app.name for one in found]
        if stopped and not yes:
            replicas = sum(one.app.replicas for one in found)
            confirm(f"Stop {', '.join(stopped)}, with {replicas} replicas", "Nothing was stopped")
        if stopped:
            warm.end(schedules, set(stopped))
        for one in found:
            account.stop(one.app)
        cli_deployed.print_stopped(stopped, as_json)


def scale(  # noqa: PLR0917 - every one is an option with a name
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Whose pool.", autocompletion=completion.models)],
    least: Annotated[int | None, typer.Option("--min", min=0, metavar="N", help="Replicas that are always up.")] = None,
    most: Annotated[int | None, typer.Option("--max", min=1, metavar="N", help="Most replicas.")] = None,
    buffer: Annotated[int | None, typer.Option("--buffer", min=0, metavar="N", help="Idle ones kept ahead.")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="G[:n]", help="Its tier; else the model's own.", autocompletion=completion.gpus),
    ] = None,
    as_json: Json = False,
    env: Env = None,
) -> None:
    """Set how many replicas of a model are kept. It holds until its tier is deployed again."""
    from service.errors import UsageError

    options = {"min_containers": least, "max_containers": most, "buffer_containers": buffer}
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        raise UsageError("Nothing to set was given.", hint="Give --min, --max or --buffer.")
    if least and most and least > most:
        raise UsageError(f"--min {least} is above --max {most}.", hint="Lower --min or raise --max.")
    with modal_word(env):
        settings = load_settings([model], gpu)
        from service.cli import deployed as cli_deployed
        from service.modal_app import deployed

        names = deployed.Names(settings)
        cli_deployed.scale(names, names.target(model, gpu), given, as_json)


@contextmanager
def modal_word(env: str | None, stopped: str = "Stopped.") -> Iterator[None]:
    """Run a word that speaks to Modal: in this environment, with the service's logs shown; Ctrl-C ends it with 130."""
    from service.cli.terminal import logs_shown
    from service.errors import ServiceError

    use_environment(env)
    try:
        with logs_shown(say):
            yield
    except KeyboardInterrupt:
        say(stopped)
        raise typer.Exit(130) from None
    except (ServiceError, typer.Exit):
        raise
    except Exception:
        if "modal_version" in sys.modules:  # Modal's client was imported, or has failed at that: then it does again
            modal_client.load()
        raise


def is_meant(modal: bool, env: str | None, url: str | None = None) -> bool:
    """Tell whether a word is about the deployed service: by --modal, or by --env, which names an environment of it.

    Raises:
        UsageError: --url says that it is about another one.
    """
    if url and (modal or env):
        from service.errors import UsageError

        raise UsageError(
            f"--url and {'--modal' if modal else '--env'} name two different gateways.", hint="Give one of them."
        )
    return modal or bool(env)


def deployed_gateway() -> str:
    """Return the URL of the deployed gateway, without `/v1`."""
    say("Looking up the gateway")  # importing Modal's client takes longer than all before
    from service.modal_app import deployed
    from service.settings import Settings

    return (deployed.find(deployed.Names(Settings.load()), None).url or "").rstrip("/")


def use_environment(env: str | None) -> None:
    """Choose Modal's environment, before its client is imported; from now on no Ctrl-C is lost in it."""
    interrupts.note()
    if env:
        os.environ["MODAL_ENVIRONMENT"] = env


def use_modal(env: str | None) -> None:
    """Choose Modal's environment, and import its client.

    Raises:
        ServiceError: It cannot read its configuration.
    """
    use_environment(env)
    modal_client.load()


def load_settings(names: Iterable[str] = (), gpu: str | None = None) -> Settings:
    """Return the settings; names and GPU are checked too, before Modal's client is imported."""
    from service.registry.tiers import parse_tier
    from service.settings import Settings
    from service.weights import revisions

    settings = Settings.load()
    registry = revisions.registry(settings.models_file)
    for name in names:
        registry.resolve(name, settings.model)
    if gpu:
        parse_tier(gpu)
    return settings


def say(text: str) -> None:
    """Show a sentence on stderr: it is no result."""
    typer.echo(text, err=True)
