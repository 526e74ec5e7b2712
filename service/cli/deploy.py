"""Shows a deploy: what it would do, how far it is, and what to paste when it is done.

Progress goes to stderr, results to stdout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from rich.console import Console

from service.cli import prefetch as cli_prefetch
from service.cli.terminal import confirm, print_json, print_table, progress_console, results_console
from service.errors import ServiceError, UsageError
from service.modal_app import client, gateway_check, prices
from service.modal_app import deploy as deploying
from service.modal_app.account import environment
from service.modal_app.deploy import Made, Prepared, Step
from service.modal_app.deploy_plan import DeployRequest
from service.modal_app.gateway_access import KEY_VARIABLE, api_key
from service.registry.models import DEFAULT_ALIAS, ModelSpec
from service.settings import Settings
from service.weights.prefetch import PrefetchRequest
from service.weights.revisions import lock_file

_CLIENTS = """
curl $VLLM_GATEWAY_URL/v1/chat/completions \\
  -H "Authorization: Bearer $VLLM_API_KEY" -H 'Content-Type: application/json' \\
  -d '{"model": "llm", "messages": [{"role": "user", "content": "Hello!"}]}'

import os
from openai import OpenAI  # pip install openai
client = OpenAI(base_url=os.environ["VLLM_GATEWAY_URL"] + "/v1",
                api_key=os.environ["VLLM_API_KEY"])
messages = [{"role": "user", "content": "Hello!"}]
chat = client.chat.completions.create(model="llm", messages=messages)
print(chat.choices[0].message.content)

vllm-service chat
vllm-service connect claude     # or codex, opencode, openwebui, litellm, env"""


class Progress:
    """A spinner on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        """Show a sentence that stays."""
        self._console.print(text, markup=False)

    @contextmanager
    def doing(self, text: str) -> Iterator[Callable[[str], None]]:
        """Show what is being waited for, with the latest line of it on a terminal."""
        if not self._console.is_terminal:
            self.say(text)
            yield lambda _: None
            return
        with self._console.status(f"{text} …") as status:
            room = max(20, self._console.width - len(text) - 8)
            yield lambda line: status.update(f"{text} … [dim]{line[:room].replace('[', '(')}[/dim]")

    def prefetch(self, specs: tuple[ModelSpec, ...], settings: Settings) -> None:
        """Fetch weights into Modal's volume."""
        self.say(f"Fetching weights on a CPU, so that no GPU waits for them: {', '.join(spec.key for spec in specs)}")
        request = PrefetchRequest(specs=specs, recorded_in=str(lock_file(settings.models_file)))
        with closing(client.prefetch(request, settings)) as events:
            cli_prefetch.follow(request, events, False, on_modal=True, results=self._console)


def run(
    request: DeployRequest, settings: Settings, *, yes: bool, dry_run: bool, retry: bool, check: bool, as_json: bool
) -> None:
    """Deploy, and print what to paste; with `retry` boot again what is known to fail.

    Raises:
        ServiceError: A prerequisite is missing, or a step failed.
        KeyboardInterrupt: It was interrupted.
    """
    progress, made = Progress(progress_console()), Made()
    deploying.check(request, settings)
    prepared = deploying.prepare(request, settings)
    if check and not (api_key() or prepared.missing.keys_secret):
        raise UsageError(
            f"--check needs a key of the gateway, and {KEY_VARIABLE} is not set.",
            hint=f"Set it to a key of secret '{prepared.plan.settings.keys_secret}'.",
        )
    if dry_run:
        print_json(_plan(prepared)) if as_json else _print_plan(prepared, stderr=False)
        return
    if not as_json:
        _print_plan(prepared, stderr=True)
    shown = False
    try:
        if not prepared.is_complete:
            if not yes:
                confirm("Deploy this", "Nothing was deployed")
            prepared = deploying.deploy(prepared, settings, progress, made)
        for failure in deploying.retry(prepared, settings) if retry else ():
            progress.say(f"{failure.model} boots at its next request again. Recorded: {failure.reason}")
        _leave_prices(prepared.plan.apps[-1].name, progress)
        url = deploying.gateway_url(prepared)
        models, answer = _checked(url, made.key, prepared, check, progress)
        shown = True
        if as_json:
            done: dict[str, Any] = {"url": f"{url}/v1", "key": made.key, "secrets_made": made.secrets}
            print_json(_plan(prepared) | done | {"published": made.published, "models": models, "answer": answer})
        else:
            results_console().print(_greeting(url, made, prepared, models, answer), markup=False)
    finally:
        if made.key and not shown:  # nobody can read it again
            progress.say(f"The admin key, shown once: {made.key}")


def _leave_prices(app: str, progress: Progress) -> None:
    """Leave them for the gateway. It has a table of its own, and the deploy is done: an error is no more than told."""
    try:
        prices.leave_for_gateway(app)
    except ServiceError as error:
        progress.say(f"'{app}' counts by the prices that it has: {error}")


def _checked(
    url: str, key: str | None, prepared: Prepared, chat: bool, progress: Progress
) -> tuple[list[dict[str, Any]] | None, str | None]:
    """Return the models as the gateway lists them, None without a key; and an answer where a chat was asked for."""
    key = key or api_key()
    if not key:
        with progress.doing("Asking the gateway for its health"):
            gateway_check.health(url)
        return None, None
    with progress.doing("Asking the gateway for its models"):
        listed = gateway_check.models(url, key)
    keys = {DEFAULT_ALIAS, *(spec.key for spec in prepared.plan.models)}
    models = [{name: entry.get(name) for name in ("id", "gpu", "state")} for entry in listed if entry["id"] in keys]
    if not chat:
        return models, None
    name = prepared.plan.settings.model
    with progress.doing(f"Waking '{name}' for a chat"):
        return models, gateway_check.chat(url, key, name, float(prepared.plan.settings.startup_timeout_s + 60))


def _plan(prepared: Prepared) -> dict[str, Any]:
    return {
        "workspace": prepared.workspace,
        "environment": environment() or None,
        "apps": [_app(step) for step in prepared.steps],
        "missing_secrets": prepared.missing.names,
        "dollars_per_hour_up": round(prepared.dollars_per_hour_up, 2),
        "dollars_per_hour_idle": round(prepared.dollars_per_hour_idle, 2),
        "notes": list(prepared.notes),
    }


def _app(step: Step) -> dict[str, Any]:
    tier = step.app.tier
    return {
        "app": step.app.name,
        "action": step.action,
        "changes": list(step.changes),
        "costs_snapshots": step.costs_snapshots,
        "gpu": tier.gpu.name if tier else None,
        "n_gpu": tier.n_gpu if tier else 0,
        "models": [spec.key for spec in step.app.models],
        "dollars_per_hour": round(step.dollars_per_hour, 2),
    }


def _print_plan(prepared: Prepared, *, stderr: bool) -> None:
    console = progress_console() if stderr else results_console()
    where = f", environment {environment()}" if environment() else ""
    console.print(f"Workspace {prepared.workspace}{where}", markup=False)
    rows = [
        (
            step.app.name,
            step.action,
            step.app.tier.label if step.app.tier else "no GPU",
            f"{step.dollars_per_hour:.2f}" if step.app.tier else "-",
            ", ".join(spec.key for spec in step.app.models) or "all",
        )
        for step in prepared.steps
    ]
    print_table(("app", "action", "GPU", "$/h", "models"), rows, right=("$/h",), stderr=stderr)
    for sentence in _sentences(prepared):
        console.print(sentence, markup=False)


def _sentences(prepared: Prepared) -> Iterator[str]:
    for step in prepared.steps:
        if step.action == "update":
            yield f"{step.app.name}: changed: {', '.join(step.changes)}"
        if step.costs_snapshots:
            yield "  It costs the memory snapshots of its models: their next boots are cold."
    if prepared.missing.names:
        yield f"Makes the missing secrets: {', '.join(prepared.missing.names)}"
    yield f"'llm' means {prepared.plan.settings.model}"
    yield f"Replicas that are up: ${prepared.dollars_per_hour_up:.2f}/h for one of each tier, ended after"
    yield (
        f"{prepared.plan.settings.scaledown_window} s without a request; idle: ${prepared.dollars_per_hour_idle:.2f}/h "
        f"({prices.current().source})"
    )
    yield from prepared.notes
    if prepared.is_complete:
        yield "Nothing has changed."


def _greeting(url: str, made: Made, prepared: Prepared, models: list[dict[str, Any]] | None, answer: str | None) -> str:
    lines = [f"export VLLM_GATEWAY_URL={url}"]
    if made.key:
        lines += [f"export {KEY_VARIABLE}={made.key}", "", "This key is shown once: Modal keeps only its digest."]
    else:
        lines += [f"export {KEY_VARIABLE}=<a key of secret {prepared.plan.settings.keys_secret}>"]
    lines += [""]
    lines += [f"{entry['id']}: {entry['gpu']}, {entry['state']}" for entry in models or ()]
    if models is None:
        lines += [f"The gateway answers. Its models were not listed: {KEY_VARIABLE} is not set."]
    if answer:
        lines += [f"{gateway_check.QUESTION} {' '.join(answer.split())}"]
    return "\n".join([*lines, _CLIENTS])


def rolled_back(done: list[tuple[str, int, int]], as_json: bool) -> None:
    """Show what was rolled back."""
    if as_json:
        print_json([{"app": name, "from_version": before, "to_version": now} for name, before, now in done])
        return
    for name, before, now in done:
        results_console().print(f"{name}: version {before} -> {now}", markup=False)
