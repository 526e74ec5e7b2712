"""The word of the command that answers a file of requests: batch. Parse and call, no more."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli import completion
from service.cli.cloud import Env, Json, is_meant, load_settings, modal_word, not_empty, say

if TYPE_CHECKING:
    from service.cli.batch_input import BatchInput, Request
    from service.cli.batch_run import Outputs
    from service.settings import Settings


def register(app: typer.Typer) -> None:
    """Add the word to the command."""
    app.command(epilog="Example: vllm-service batch in.jsonl -o out.jsonl --model qwen3-8b")(batch)


def batch(  # noqa: PLR0917 - every one is an option with a name
    source: Annotated[Path, typer.Argument(metavar="IN", help="JSON lines, or a table: .csv, .tsv.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="JSON lines, or a table where IN is one.")
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="M", help="For all lines; else their own.", autocompletion=completion.models),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="GPU", help="Else the model's own.", autocompletion=completion.gpus),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, max=100, metavar="N", help="Send enough for so many.")] = 1,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="Of each row: {column}.")] = None,
    system: Annotated[str, typer.Option("--system", metavar="TEXT", help="The system prompt of each row.")] = "",
    schema: Annotated[
        Path | None, typer.Option("--schema", metavar="FILE", help="JSON schema of the answers: OUT's columns.")
    ] = None,
    fields: Annotated[
        list[str] | None, typer.Option("--field", metavar="F=V", help="Of each body: max_tokens=200; repeatable.")
    ] = None,
    modal: Annotated[bool, typer.Option("--modal", help="By calls of Modal's class, spread with .map.")] = False,
    url: Annotated[
        str | None,
        typer.Option("--url", metavar="URL", help="Else VLLM_GATEWAY_URL, else that of 'up'.", callback=not_empty),
    ] = None,
    as_json: Json = False,
    env: Env = None,
) -> None:
    """Answer a file of requests, each once. The same command goes on after any end. The key is in VLLM_API_KEY."""
    with modal_word(env):
        settings = load_settings(gpu=gpu)
        from service.cli import batch_input, batch_run
        from service.cli.batch_rows import Template

        if system and prompt is None:
            from service.errors import UsageError

            raise UsageError("--system goes with --prompt.", hint="Lines of requests have their own system prompt.")
        request = batch_input.Request(
            Template(prompt) if prompt is not None else None,
            prompt or "",
            system,
            batch_input.read_schema(schema) if schema else None,
            batch_input.read_fields(fields or ()) | ({"model": model} if model else {}),
        )
        found = batch_input.BatchInput(source, request)
        files = batch_run.outputs(output, found)
        answer = _on_modal if is_meant(modal, env, url) else _at_gateway
        answer(found, request, files, settings, model, gpu, replicas, url, as_json=as_json)


def _at_gateway(  # noqa: PLR0917 - what the word was given
    source: BatchInput, request: Request, files: Outputs, settings: Settings, model: str | None, gpu: str | None,
    replicas: int, url: str | None, *, as_json: bool,
) -> None:  # fmt: skip
    from dataclasses import replace

    from service.batch.concurrency import MOST, ConcurrencySearch
    from service.cli import batch_run, batch_send, gateways, service_test
    from service.cli.batch_input import BatchInput
    from service.modal_app import gateway_check

    gateway = gateways.find(url, False, settings)
    if gpu:
        named = service_test.service_at(gateway.url, gateway.key, model, gpu, settings).model
        request = replace(request, fields={**request.fields, "model": named})
        source = BatchInput(source.path, request)
    if name := request.fields.get("model"):
        gateway_check.model(gateway.url, gateway.key, str(name))
    else:
        gateway_check.models(gateway.url, gateway.key)
    answer_s = settings.request_timeout_s + settings.hold_s
    search = ConcurrencySearch(most=MOST * replicas)
    batch_run.run(source, request, files, lambda: batch_send.to_gateway(gateway, answer_s), search, as_json=as_json)


def _on_modal(  # noqa: PLR0917 - what the word was given
    source: BatchInput, request: Request, files: Outputs, settings: Settings, model: str | None, gpu: str | None,
    replicas: int, _url: str | None, *, as_json: bool,
) -> None:  # fmt: skip
    name = model or _first_model(source)
    load_settings([name])
    say(f"Looking up the pool of {name}")  # importing Modal's client takes longer than all before
    from service.batch.concurrency import ConcurrencySearch
    from service.cli import batch_input, batch_run
    from service.modal_app import batch_pool

    pool = batch_pool.find(settings, name, gpu)
    many = replicas * (settings.target_inputs or settings.max_inputs)
    batch_run.run(
        source,
        request,
        files,
        pool.mapped,
        ConcurrencySearch(first=many, most=many),
        lines=lambda lines: batch_input.for_model(lines, pool.model, (lambda _: True) if model else pool.is_named),
        as_json=as_json,
    )


def _first_model(source: BatchInput) -> str:
    from service.batch.lines import Line
    from service.cli.batch_input import model_of
    from service.registry.models import DEFAULT_ALIAS

    first = next((line for line in source.lines() if isinstance(line, Line)), None)
    return (first and model_of(first)) or DEFAULT_ALIAS
