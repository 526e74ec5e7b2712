"""The words of the command that measure a service: bench, loadtest. Parse, call, print."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli import completion
from service.cli.cloud import Json, not_empty, say

if TYPE_CHECKING:
    from service.engine.installer import InstallProgress
    from service.modal_app.measured_service import MeasuredService

Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL", envvar="VLLM_GATEWAY_URL", help="Of the service; else that of 'up'.", callback=not_empty
    ),
]
Model = Annotated[str, typer.Option(metavar="M", help="As requests name it.", autocompletion=completion.models)]
Page = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Draw it as a page, too.")]
OutputTokens = Annotated[int, typer.Option(min=2, metavar="N", help="Of an answer.")]


def register(app: typer.Typer) -> None:
    """Add the words to the command."""
    app.command(epilog="Example: vllm-service bench --model qwen3-8b --concurrency 32 --html bench.html")(bench)
    app.command(epilog="Example: vllm-service loadtest --users 100 --run-time 5m --html load.html")(loadtest)


def bench(  # noqa: PLR0917 - every one is an option with a name
    url: Url = None,
    model: Model = "llm",
    requests: Annotated[int, typer.Option(min=1, metavar="N", help="How many.")] = 100,
    concurrency: Annotated[int, typer.Option(min=1, metavar="N", help="Most at once.")] = 8,
    rate: Annotated[float | None, typer.Option(min=0.001, metavar="R", help="Begun per second; else at once.")] = None,
    input_tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Of a prompt, about.")] = 256,
    output_tokens: OutputTokens = 128,
    html: Page = None,
    as_json: Json = False,
) -> None:
    """Measure a model with vLLM's own benchmark. The key is in VLLM_API_KEY."""
    with _measured(url, model, html) as service:
        from service.benchmarks import prompts, vllm_bench
        from service.engine import environment

        service.wake(input_tokens + output_tokens, _timeout_s(), say)
        with _progress() as show:
            engine = environment.ensure(on_progress=lambda progress: show(_installing(progress)))
            texts = prompts.build(requests, input_tokens, service.tokens_per_word(prompts.sample()))
            job = vllm_bench.Job(service.url, model, texts, output_tokens, concurrency, rate)
            show(f"Sending {requests} requests")
            found = vllm_bench.run(
                engine.python, job, service.key, lambda count: show(f"{count} of {requests} requests have ended")
            )
        begun = f" begun at {rate:g}/s," if rate else ""
        load = f"{requests} requests,{begun} {concurrency} at a time, {output_tokens} tokens out"
        tool = f"vLLM's benchmark {environment.vllm_version(engine.device)}"
        _show(found, service, tool, load, html=html, as_json=as_json)


def loadtest(  # noqa: PLR0917 - every one is an option with a name
    url: Url = None,
    model: Model = "llm",
    users: Annotated[int, typer.Option("--users", "-u", min=1, metavar="N", help="Most at once.")] = 36,
    spawn_rate: Annotated[
        float, typer.Option("--spawn-rate", "-r", min=0.01, metavar="R", help="Users that come per second.")
    ] = 1.0,
    run_time: Annotated[str, typer.Option("--run-time", "-t", metavar="TIME", help="Such as 30s or 5m.")] = "1m",
    pause: Annotated[str, typer.Option(metavar="S-S", help="Seconds between answer and question.")] = "1-5",
    output_tokens: OutputTokens = 128,
    processes: Annotated[int, typer.Option(min=1, metavar="N", help="Locust's own.")] = 1,
    html: Page = None,
    as_json: Json = False,
) -> None:
    """Let users of Locust chat with a model. The key is in VLLM_API_KEY."""
    with _measured(url, model, html) as service:
        from service.benchmarks import locust_run
        from service.modal_app import load_options

        given = load_options.users(
            service, users, spawn_rate, run_time, pause, output_tokens=output_tokens, processes=processes
        )
        service.wake(output_tokens, _timeout_s(), say)
        with _progress() as show:
            python = locust_run.ensure_python(lambda progress: show(_installing(progress)))
            show(f"{given.users} users come")
            found = locust_run.run(
                python, given, service.key, lambda now, count: show(f"{now} s: {count} requests have ended")
            )
        _show(found, service, f"Locust {locust_run.version()}", load_options.phrase(given), html=html, as_json=as_json)


@contextmanager
def _measured(url: str | None, model: str, html: Path | None) -> Iterator[MeasuredService]:
    """Give the service that is measured. Ctrl-C and a terminal that is closed end the word with 130, and the load."""
    from service.cli.terminal import logs_shown
    from service.files import require_writable
    from service.local.signals import signals_interrupt
    from service.modal_app import gateway_access, measured_service
    from service.settings import Settings

    if html:
        require_writable(html)
    base = gateway_access.base_url(url or f"http://127.0.0.1:{Settings.load().port}")
    try:
        with signals_interrupt(), logs_shown(say):
            yield measured_service.MeasuredService(base, gateway_access.api_key(), model)
    except KeyboardInterrupt:
        say("Stopped.")
        raise typer.Exit(130) from None


def _timeout_s() -> float:
    from service.settings import Settings

    return float(Settings.load().startup_timeout_s)


def _show(
    records: list[Any], service: MeasuredService, tool: str, load: str, *, html: Path | None, as_json: bool
) -> None:
    from datetime import UTC, datetime

    from service.benchmarks import report, text
    from service.cli.terminal import print_json, results_console
    from service.modal_app import measured_service

    facts = {
        "tool": tool,
        "url": service.url,
        "model": service.model,
        "load": load,
        "ended_at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
    }
    found = report.build(records, facts)
    if as_json:
        print_json(found)
    else:
        results_console().print("\n".join(text.lines(found)), markup=False)
    if html:
        measured_service.write_page(html, found)
    measured_service.check_answered(found)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Give what shows how far it is: one line that changes, on a terminal; nothing elsewhere."""
    from service.cli.terminal import progress_console

    console = progress_console()
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("") as status:
        yield status.update


def _installing(progress: InstallProgress) -> str:
    return f"{progress.step}: {progress.done} of {progress.total} {progress.unit}"
