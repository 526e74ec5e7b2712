"""Shows the test of a service: one line a check, as it ends."""

from __future__ import annotations

from typing import Any

import typer

from service.cli.terminal import print_json, results_console
from service.errors import ServiceError, UsageError
from service.modal_app import gateway_check, service_check
from service.modal_app.gateway_access import base_url
from service.modal_app.service_check import Check, Service
from service.registry.models import DEFAULT_ALIAS
from service.registry.tiers import parse_tier
from service.settings import Settings

_BOOT_MARGIN_S = 60.0


def service_at(url: str, key: str, model: str | None, gpu: str | None, settings: Settings) -> Service:
    """Return the service at a URL, and the model by which it is tested, as requests name it.

    Args:
        url: With or without `/v1`.
        key: Empty: it needs none.
        model: None: its default.
        gpu: None: the model's own tier.
        settings: Say how long a boot may take.

    Raises:
        UsageError: The URL is none, or the GPU has a count, which no model's name has.
        ServiceError: It does not tell its default.
    """
    base, name = base_url(url), model or DEFAULT_ALIAS
    if gpu:
        kind, count = parse_tier(gpu)
        if count:
            raise UsageError(
                f"--gpu {gpu}: the names in requests have no number of GPUs.", hint=f"Leave it out: --gpu {kind.name}."
            )
        name = f"{model or gateway_check.model(base, key, DEFAULT_ALIAS)['display_name']}-{kind.slug}"
    return Service(base, key, name, settings.startup_timeout_s + _BOOT_MARGIN_S)


def run(service: Service, as_json: bool) -> None:
    """Run all checks and print them: a line each, or one object at the end.

    Raises:
        ServiceError: A check failed.
    """
    checks = []
    for check in service_check.run(service, _say_wake):
        checks.append(check)
        if not as_json:
            results_console().print(_line(check), markup=False)
    failed = [check.name for check in checks if check.error]
    if as_json:
        found = {
            "url": service.url,
            "model": service.model,
            "passed": not failed,
            "checks": [_fields(one) for one in checks],
        }
        print_json(found)
    if failed:
        raise ServiceError(f"{service.url} did not pass: {', '.join(failed)}.")


def _say_wake(entry: dict[str, Any]) -> None:
    price = entry.get("dollars_per_hour")
    cost = f", which costs ${price:.2f}/h while it is up" if price else ""
    typer.echo(f"Waking {entry['display_name']} on {entry['gpu']}{cost}", err=True)


def _line(check: Check) -> str:
    begin = f"{check.name:<12}{'failed' if check.error else 'ok':<7}{check.seconds:8.2f} s"
    if check.error:
        return f"{begin}  {check.error}"
    rate = check.figure.tokens_per_second
    return "  ".join(part for part in (begin, f"{rate:.1f} tokens/s" if rate else "", check.figure.text) if part)


def _fields(check: Check) -> dict[str, Any]:
    return {
        "check": check.name,
        "ok": check.error is None,
        "seconds": round(check.seconds, 3),
        "tokens_per_second": check.figure.tokens_per_second,
        "figure": check.figure.text or None,
        "error": check.error.message if check.error else None,
        "hint": check.error.hint if check.error else None,
    }
