"""The checks of `vllm-service doctor` that need Modal: account, secrets, deployed apps, their gateway and boots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import httpx2
from modal.config import config

from service.errors import ServiceError
from service.local import checks
from service.local.checks import Finding
from service.modal_app import account, client, deployed, prerequisites
from service.modal_app.deploy import FREE_ENDPOINTS
from service.modal_app.deployed import DeployedApp, Names
from service.modal_app.deployment import hub_secret
from service.modal_app.gateway_access import api_key
from service.registry.models import Registry
from service.settings import Settings

_DEPLOY = "Deploy: vllm-service deploy."
_HEALTH_TIMEOUT_S = 8.0
_BOOTS = "boots at Modal"


def findings() -> Iterator[Finding]:
    """Yield what the checks find; those that need what an earlier one did not find are left out."""
    account_found = next(checks.run([("account", _account)]))
    yield account_found
    if account_found.state == "ok":
        with suppress(ServiceError):  # a check of this machine has told it
            yield from _of_service(*checks.settings_and_registry())


def _of_service(settings: Settings, registry: Registry) -> Iterator[Finding]:
    names, found = deployed.Names(settings), list[DeployedApp]()
    yield from checks.run(
        [
            ("secrets", lambda: _secrets(settings, registry)),
            ("apps", lambda: _apps(names, found)),
        ]
    )
    if found:
        yield from checks.run(
            [
                ("gateway", lambda: _gateway(names, found)),
                (_BOOTS, lambda: _boots(settings)),
            ]
        )


def is_logged_in() -> bool:
    """Tell whether this machine has a token of Modal's; the account's check tells whether it is valid."""
    return bool(config["token_id"] and config["token_secret"])


def _account() -> Finding:
    if not is_logged_in():
        return Finding(
            "account",
            "warn",
            "This machine has no Modal token, which only deploys need.",
            "Run 'modal setup'; on a machine without a browser set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET.",
        )
    workspace = account.connect()
    return Finding("account", "ok", f"Workspace {workspace}, environment {account.environment() or 'of the default'}.")


def _secrets(settings: Settings, registry: Registry) -> Finding:
    lacking = prerequisites.missing(settings).names
    if lacking:
        return Finding("secrets", "warn", f"Missing: {', '.join(lacking)}.", "'vllm-service deploy' makes them.")
    name = hub_secret(registry.specs.values(), settings.hub_secret)
    if name and (why := client.why_hub_secret_missing(name)):
        return Finding(
            "secrets",
            "warn",
            f"Gated models cannot be fetched: {why.rstrip('.')}.",
            f"Create it: modal secret create {name} HF_TOKEN=<token>.",
        )
    return Finding("secrets", "ok", "Keys, proxy token and the hub's token are there.")


def _apps(names: Names, found: list[DeployedApp]) -> Finding:
    found += deployed.apps(names)
    if not found:
        return Finding("apps", "warn", "Nothing of this service is deployed.", _DEPLOY)
    listed = ", ".join(one.app.name for one in found)
    replicas, dollars = sum(one.app.replicas for one in found), sum(one.dollars_per_hour for one in found)
    text = f"{listed}: {replicas} replicas, ${dollars:.2f}/h now."
    if names.gateway not in {one.app.name for one in found}:
        return Finding("apps", "failed", f"{text} The gateway is not deployed.", _DEPLOY)
    endpoints = sum(layout.endpoints for layout in account.layouts(account.deployed_apps().values()).values())
    if endpoints >= FREE_ENDPOINTS:
        return Finding(
            "apps",
            "warn",
            f"{text} This environment has {endpoints} web endpoints; Modal's free plan allows {FREE_ENDPOINTS}.",
            "'vllm-service stop --gpu G' frees one.",
        )
    return Finding("apps", "ok", text)


def _gateway(names: Names, found: list[DeployedApp]) -> Finding:
    """Ask for its health, and with a key for its models; neither wakes a GPU."""
    url = next((one.url for one in found if one.app.name == names.gateway), None)
    if not url:
        return Finding("gateway", "warn", "There is no gateway to ask.", _DEPLOY)
    url, key = url.rstrip("/"), api_key()
    path, headers = ("/v1/models", {"Authorization": f"Bearer {key}"}) if key else ("/health", {})
    try:
        answer = httpx2.get(f"{url}{path}", headers=headers, timeout=_HEALTH_TIMEOUT_S)
    except httpx2.TimeoutException:
        text = f"{url}{path} has not answered within {_HEALTH_TIMEOUT_S:.0f} s; its container may be starting."
        return Finding("gateway", "warn", text, "Try again; its log: vllm-service logs.")
    except httpx2.HTTPError as error:
        return Finding("gateway", "failed", f"{url}{path}: {type(error).__name__}.", "Its log: vllm-service logs.")
    if answer.status_code == 401:
        return Finding(
            "gateway",
            "failed",
            "The gateway does not know the key in VLLM_API_KEY (401).",
            "Set it to the key that the first deploy has shown, or to one of 'vllm-service keys new NAME --modal'. "
            f"Where all are lost: modal secret create --force {names.settings.keys_secret} API_KEYS=admin=<new key>, "
            "then modal deploy -m service.gateway_app.",
        )
    if answer.status_code != 200:
        return Finding(
            "gateway", "failed", f"{url}{path} answered {answer.status_code}.", "Its log: vllm-service logs."
        )
    more = " and knows the key" if key else "; VLLM_API_KEY is not set, so no key was tried"
    return Finding("gateway", "ok", f"{url} answers{more}.")


def _boots(settings: Settings) -> Finding:
    return checks.boots(_BOOTS, client.boots(settings.volume_prefix), "vllm-service boots --modal")
