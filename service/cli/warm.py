"""Shows schedules that keep models warm, and sets and ends them."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import typer

from service.cli.terminal import confirm, print_json, print_table, results_console
from service.errors import ServiceError, UsageError
from service.modal_app import account, deployed, prices, warm
from service.modal_app.deployed import Names, Target
from service.modal_app.warm_schedule import Schedule


def show(names: Names, as_json: bool) -> None:
    """Print all schedules: a table, or a JSON array with one object each."""
    account.check_environment()
    found, now = warm.Schedules(names.settings.volume_prefix).all(), time.time()
    if as_json:
        print_json([_fields(one, now) for one in found])
        return
    if not found:
        results_console().print("No model is kept warm. Keep one: vllm-service warm MODEL --for 30m")
        return
    rows = [
        (one.model, one.app, "warm" if one.is_active(now) else "-", f"{one.dollars_per_hour:.2f}", one.text())
        for one in found
    ]
    print_table(("model", "app", "now", "$/h", "when"), rows, right=("$/h",))


def begin(
    names: Names,
    target: Target,
    seconds: int | None,
    span: tuple[int, int, str] | None,
    *,
    yes: bool,
    as_json: bool,
) -> None:
    """Tell what a schedule costs, ask, set it, and print it.

    Args:
        names: The apps of this service.
        target: The model and its tier.
        seconds: From now on; None: on weekdays.
        span: Begin and end in minutes since midnight, and their time zone.
        yes: Do not ask.
        as_json: Print one object.

    Raises:
        ServiceError: The model is not deployed, Modal refused, or the answer was no.
        UsageError: The model cannot run there, or standard input is no terminal, and `yes` was not given.
    """
    target.check_fit()
    now, model = time.time(), _model(target)
    app, price = deployed.find(names, target).app.name, prices.current().of(target.tier, names.settings.region)
    if span:
        schedule = Schedule(app, model, price, begin=span[0], end=span[1], tz=span[2])
    else:
        schedule = Schedule(app, model, price, until=now + (seconds or 0))
    cost = f"${price:.2f}/h, {_cost(schedule, now)}"
    typer.echo(f"{model} on {target.tier.label}: a replica up {schedule.text()}: {cost}", err=True)
    if not yes:
        confirm("Keep it warm", "Nothing was scheduled")
    why_not = warm.begin(warm.Schedules(names.settings.volume_prefix), schedule, names.gateway)
    if as_json:
        print_json(_fields(schedule, now) | {"why_not_now": why_not})
        return
    not_now = f"\nNot now, and it is tried again within a quarter of an hour: {why_not}" if why_not else ""
    text = f"{model} is kept warm, {schedule.text()}. End it: vllm-service warm {model} --end{not_now}"
    results_console().print(text, markup=False)


def end(names: Names, target: Target, as_json: bool) -> None:
    """End the schedule of a model on a tier, and print it.

    Raises:
        ServiceError: There is none, or Modal refused.
    """
    account.check_environment()
    model = _model(target)
    apps = {target.app, target.tier.model_app_name(model)}
    ended = warm.end(warm.Schedules(names.settings.volume_prefix), apps, model)
    if not ended:
        raise ServiceError(f"{model} on {target.tier.label} has no schedule.", hint="List all: vllm-service warm.")
    if as_json:
        print_json([_fields(one, time.time()) for one in ended])
        return
    results_console().print(f"{model} on {target.tier.label} is no longer kept warm; idle replicas end by themselves.")


def _model(target: Target) -> str:
    if target.model is None:
        raise UsageError("A schedule is that of a model, and none was given.", hint="Name a model.")
    return target.model.key


def _cost(schedule: Schedule, now: float) -> str:
    dollars = schedule.hours(now) * schedule.dollars_per_hour
    return f"${dollars:.2f} in all" if schedule.until else f"${dollars:.2f} a weekday"


def _fields(schedule: Schedule, now: float) -> dict[str, Any]:
    return {
        "app": schedule.app,
        "model": schedule.model,
        "when": schedule.text(),
        "until": datetime.fromtimestamp(schedule.until, UTC).isoformat() if schedule.until else None,
        "active": schedule.is_active(now),
        "dollars_per_hour": schedule.dollars_per_hour,
        "dollars": round(schedule.hours(now) * schedule.dollars_per_hour, 2),
    }
