"""The word `plan`: whether a model fits, what it costs, and what scale to zero does to it. Parse and call, no more."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from service import interrupts
from service.cli import completion, modal_client
from service.cli.cloud import Env, Json, modal_word

if TYPE_CHECKING:
    from service.boots.records import BootRecord
    from service.registry.prices import Prices
    from service.settings import Settings

_MOST = 10_000_000  # requests an hour, seconds, or tokens


def register(app: typer.Typer) -> None:
    """Add the word to the command."""
    app.command(epilog="Example: vllm-service plan qwen3-8b --gpu L40S --requests-per-hour 30 --market-price 0.05/0.2")(
        plan
    )


def plan(  # noqa: PLR0917 - every one is an option with a name
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Key, hub id or directory.", autocompletion=completion.models)
    ],
    gpu: Annotated[
        str | None,
        typer.Option(metavar="G[:n]", help="Its tier; else the model's own.", autocompletion=completion.gpus),
    ] = None,
    n_gpu: Annotated[int | None, typer.Option(min=1, max=8, metavar="N", help="GPUs to spread it over.")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=16, metavar="N", help="Tokens of context; else the entry's.")
    ] = None,
    requests_per_hour: Annotated[
        float, typer.Option(min=0, metavar="R", help="How many come, at random times.")
    ] = 10.0,
    tokens: Annotated[str, typer.Option(metavar="IN/OUT", help="Tokens of a typical request.")] = "1000/300",
    request_seconds: Annotated[float, typer.Option(min=0.1, metavar="S", help="How long one runs.")] = 10.0,
    boot_seconds: Annotated[
        float | None, typer.Option(min=0, metavar="S", help="Of a boot; else of the recorded ones, else 120.")
    ] = None,
    market_price: Annotated[
        str | None,
        typer.Option(metavar="IN/OUT", help="$ for 1M tokens elsewhere, to compare with: 0.05/0.2, or one for both."),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Ask neither the hub nor Modal, whatever is needed.")
    ] = False,
    as_json: Json = False,
    env: Env = None,
) -> None:
    """Tell whether a model fits a GPU, and what it costs."""
    with modal_word(env):
        from service.boots import records
        from service.errors import UsageError
        from service.planning import report
        from service.planning.models import planned_model
        from service.registry.models import resolve_or_source
        from service.registry.tiers import parse_tier, tier_of
        from service.settings import Settings
        from service.weights import revisions

        settings = Settings.load()
        registry = revisions.registry(settings.models_file)
        choice = resolve_or_source(registry, model, settings.model)
        if named := gpu or (choice.gpu.name if choice.gpu else settings.gpu):
            kind, count = parse_tier(named)
        else:
            kind, count = None, None
        if count and n_gpu and count != n_gpu:
            raise UsageError(f"--gpu {gpu} and --n-gpu {n_gpu} are two counts.", hint="Give one of them.")
        count = count or n_gpu or settings.n_gpu
        is_free = kind is None and count is None and choice.spec.key not in registry.specs
        tokens_in, tokens_out = report.pair(tokens, "--tokens", "1000/300", int)
        figures = {"--requests-per-hour": requests_per_hour, "--request-seconds": request_seconds}
        for option, figure in (
            figures | {"--boot-seconds": boot_seconds or 0.0, "--tokens": max(tokens_in, tokens_out)}
        ).items():
            if not figure < _MOST:
                raise UsageError(f"{option} {figure:g} is not below {_MOST:,}.", hint="Write a smaller figure.")
        planned = planned_model(choice.spec, offline=offline)
        if max_model_len and planned.max_model_len and max_model_len > planned.max_model_len:
            raise UsageError(
                f"--max-model-len {max_model_len} is above the {planned.max_model_len} tokens that "
                f"'{choice.spec.key}' was made for, which vLLM refuses.",
                hint="Write a smaller one.",
            )
        question = report.Question(
            planned=planned,
            tier=None if is_free else tier_of(choice.spec, kind, count),
            settings=settings,
            max_model_len=max_model_len,
            requests_per_hour=requests_per_hour,
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            request_s=request_seconds,
            boot_s=boot_seconds,
            market=report.pair(market_price, "--market-price", "0.05/0.2", float) if market_price else None,
        )
        with interrupts.not_lost():  # else a plan without Modal's answers would follow
            prices, boots = _of_modal(settings, offline=offline)
        own = [record for record in records.load(records.local_directory()) if record.gpu != "cpu"]
        answer = report.answer(question, prices, [*own, *boots])
        from service.cli import plan_output

        plan_output.show(answer, as_json)


def _of_modal(settings: Settings, *, offline: bool) -> tuple[Prices, list[BootRecord]]:
    """Return Modal's current prices and the deployed service's boots, where this machine is logged in."""
    from service.errors import ServiceError
    from service.registry.prices import Prices

    if offline or not _may_be_logged_in():
        return Prices(), []
    try:
        modal_client.load()
    except ServiceError:  # 'vllm-service doctor' tells it
        return Prices(), []
    from service.modal_app import account_checks, client, prices  # importing Modal's client takes longer than the rest

    current = prices.current() if account_checks.is_logged_in() else Prices()
    if not current.per_hour:  # Modal is not in reach
        return current, []
    try:
        return current, client.boots(settings.volume_prefix)
    except ServiceError:  # nothing is deployed yet
        return current, []


def _may_be_logged_in() -> bool:
    """Tell whether there is a token or a file of Modal's client, which is not imported for that."""
    from service.files import expand_user

    file = expand_user(os.environ.get("MODAL_CONFIG_PATH") or "~/.modal.toml")
    return bool(os.environ.get("MODAL_TOKEN_ID")) or file.is_file()
