"""Wiring of the public gateway to Modal: `modal deploy -m service.gateway_app` publishes `serve` of app `vllm-gateway`.

It has no GPU, and no request without a key starts one. One container has all requests: limits of a key are counted, and
the one wake of a pool is shared, in its process. Keys are read after a restore, so that no snapshot contains them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

import modal

from service import keys
from service.errors import SettingsError, UsageError
from service.gateway.app import Gateway, create_app
from service.gateway.clients import load_clients
from service.gateway.metrics import Metrics
from service.gateway.modal_pool import PROXY_SECRET, Tiers
from service.gateway.process_limits import raise_process_limits
from service.gateway.router import ModelRouter
from service.image import light_image, with_settings
from service.modal_app.container_logging import log_to_stdout
from service.modal_app.gateway_deployment import GatewayDeployment
from service.registry.models import Registry
from service.settings import Settings

MAX_INPUTS = 1000  # the most that Modal gives one container


def create_modal_app(settings: Settings, registry: Registry, environ: Mapping[str, str]) -> Gateway:
    """Return the gateway to the deployed tiers; keys and proxy token are read from `environ`, keys kept as digests.

    Raises:
        UsageError: No key is configured, or the proxy token is missing.
    """
    digests = keys.digests(environ)
    if not digests:
        raise UsageError(
            f"Secret '{settings.keys_secret}' has neither API_KEY nor API_KEYS, and without a key every "
            "request would start a GPU container.",
            hint=f"Put one in: modal secret create --force {settings.keys_secret} API_KEY=<key>.",
        )
    metrics = Metrics(_write_line)
    tiers = Tiers(settings, _proxy_headers(settings, environ), metrics.count_wake)
    clients = load_clients(environ, digests, registry, settings.model)
    return create_app(ModelRouter(registry, settings.model, tiers.pool), clients, metrics, hold_s=settings.hold_s)


def _proxy_headers(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that Modal's proxy needs in front of the tiers; none where the engines check keys."""
    if settings.direct_auth == "keys":
        return {}
    try:
        return {"Modal-Key": environ["MODAL_KEY"], "Modal-Secret": environ["MODAL_SECRET"]}
    except KeyError as error:
        raise SettingsError(
            f"Secret '{PROXY_SECRET}' has no {error.args[0]}.",
            hint="Make a token with 'modal workspace proxy-tokens create' and keep it: "
            f"modal secret create {PROXY_SECRET} MODAL_KEY=wk-… MODAL_SECRET=ws-…",
        ) from None


def _write_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


try:
    DEPLOYMENT = GatewayDeployment.resolve()
except UsageError as error:
    raise SystemExit(error.to_terminal()) from None

if not modal.is_local():
    log_to_stdout()
    raise_process_limits()  # in the container, and before its checkpoint: it takes 35 ms, which no wake should

app = modal.App(DEPLOYMENT.app_name)


@app.function(
    image=with_settings(light_image(), DEPLOYMENT.settings, {}),
    secrets=[modal.Secret.from_name(name, required_keys=required) for name, required in DEPLOYMENT.secrets.items()],
    **DEPLOYMENT.function_options(),
)
@modal.concurrent(max_inputs=MAX_INPUTS)
@modal.asgi_app()
def serve() -> Gateway:
    """Return the gateway as an ASGI application."""
    return create_modal_app(DEPLOYMENT.settings, DEPLOYMENT.registry, os.environ)
