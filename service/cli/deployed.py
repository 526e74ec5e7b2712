"""Shows what is deployed, and what was stopped or scaled."""

from __future__ import annotations

from typing import Any

from service.cli.terminal import print_json, print_table, results_console
from service.modal_app import deployed, prices
from service.modal_app.deployed import DeployedApp, Names, Target


def print_apps(apps: list[DeployedApp], as_json: bool) -> None:
    """Print the apps as a table, or as a JSON array with one object an app."""
    if as_json:
        print_json([_fields(one) for one in apps])
        return
    if not apps:
        results_console().print("Nothing of this service is deployed here. Deploy it: vllm-service deploy")
        return
    rows = [
        (
            one.app.name,
            one.tier.label if one.tier else "no GPU",
            _state(one),
            str(one.app.replicas),
            f"{one.dollars_per_hour:.2f}",
            one.url or "-",
        )
        for one in apps
    ]
    print_table(("app", "GPU", "state", "replicas", "$/h", "URL"), rows, right=("replicas", "$/h"))
    total = sum(one.dollars_per_hour for one in apps)
    results_console().print(f"${total:.2f}/h now; GPUs only: {prices.current().source}", markup=False)


def _state(one: DeployedApp) -> str:
    return "up" if one.app.replicas else "idle"


def _fields(one: DeployedApp) -> dict[str, Any]:
    return {
        "app": one.app.name,
        "gpu": one.tier.gpu.name if one.tier else None,
        "n_gpu": one.tier.n_gpu if one.tier else 0,
        "state": _state(one),
        "replicas": one.app.replicas,
        "dollars_per_hour": round(one.dollars_per_hour, 2),
        "url": one.url,
    }


def print_url(one: DeployedApp, target: Target | None, as_json: bool) -> None:
    """Print the base URL for clients: of the gateway, or of a tier, where a model is part of the query."""
    url = f"{(one.url or '').rstrip('/')}/v1"
    query = {"model": target.model.key} if target and target.model else {}
    if as_json:
        takes = "a proxy token: Modal-Key and Modal-Secret" if one.tier else "a key of the gateway"
        print_json({"app": one.app.name, "url": url, "query": query, "takes": takes})
        return
    text = f"{url}?model={query['model']}" if query else url
    results_console().print(text, markup=False)


def print_stopped(names: list[str], as_json: bool) -> None:
    """Print which apps were stopped."""
    if as_json:
        print_json({"stopped": names})
        return
    lines = [f"{name} is stopped" for name in names] or ["Nothing of this service is deployed."]
    results_console().print("\n".join(lines), markup=False)


def print_ended(target: Target, before: int, left: int, as_json: bool) -> None:
    """Print how many replicas of a model were ended."""
    if as_json:
        print_json({"app": target.app, "model": _model(target), "replicas_before": before, "replicas": left})
        return
    text = f"{_model(target)} on {target.tier.label}: {before - left} of {before} replicas ended"
    more = ", the others end after their requests" if left else ""
    results_console().print(f"{text}{more}", markup=False)


def scale(names: Names, target: Target, given: dict[str, int], as_json: bool) -> None:
    """Scale a model's pool, and print what it then has."""
    now = deployed.scale(names, target, **given)
    idle = (now["min_containers"] or 0) * prices.current().of(target.tier, names.settings.region)
    if as_json:
        print_json({"app": target.app, "model": _model(target), **now, "dollars_per_hour_idle": round(idle, 2)})
        return
    most = now["max_containers"] or "any number"
    results_console().print(
        f"{_model(target)} on {target.tier.label}: {now['min_containers'] or 0} to {most} replicas, "
        f"{now['buffer_containers'] or 0} in reserve; ${idle:.2f}/h while idle.\n"
        "It holds until its app is deployed again.",
        markup=False,
    )


def _model(target: Target) -> str:
    return target.model.key if target.model else ""
