"""Wiring of the public gateway to Modal: `modal deploy -m service.gateway_app` publishes `serve` of app `vllm-gateway`.

It has no GPU and starts none for a stranger. One container has all requests: limits of a key are counted, and the one
wake of a pool is shared, in its process. Keys are read after a restore: the application of a snapshot has none.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import modal

from service.errors import UnknownModelError, UsageError
from service.gateway.app import Door
from service.gateway.modal_pool import PROXY_SECRET, modal_gateway, tier_for
from service.gateway.process_limits import expect_many_streams
from service.image import light_image, with_settings
from service.registry.models import Registry
from service.registry.tiers import check_weights
from service.settings import Settings
from service.weights import revisions

APP = "vllm-gateway"
MAX_INPUTS = 1000  # the most that Modal gives one container
CPU, MEMORY_MB = 1.0, 1024
SCALEDOWN_WINDOW_S = 300  # idle it costs next to nothing; the first client after it waits for a container
STARTUP_TIMEOUT_S = 120


@dataclass(frozen=True)
class DoorDeployment:
    """The resolved wishes of the deployer. Identical on the deployer's machine and in the container."""

    settings: Settings
    registry: Registry

    @classmethod
    def resolve(cls) -> DoorDeployment:
        """Read settings and registry.

        What the settings say of replicas (`min_containers`, `max_inputs`, `snapshot`, …) is for the tiers' own deploys.

        Raises:
            UsageError: A setting, the models file or the default model is wrong, or that does not fit on its tier.
        """
        settings = Settings.load()
        registry = revisions.registry(settings.models_file)
        try:
            choice = registry.resolve(settings.model, Settings.model_fields["model"].default)
        except UnknownModelError as error:
            raise UnknownModelError(f"SERVICE_MODEL: {error.message}", hint=error.hint) from error
        check_weights(choice.spec, tier_for(settings, choice.spec, choice.gpu), lambda other: other.settings)
        return cls(settings, registry)

    @property
    def app_name(self) -> str:
        """Name of the app: beside an app that `SERVICE_APP` names, that name with `-gateway` behind it."""
        return f"{self.settings.app}-gateway" if self.settings.app else APP

    @property
    def secrets(self) -> dict[str, list[str]]:
        """Name -> required keys of the secrets that the container gets."""
        # Of the keys' secret nothing is required: it has API_KEY or API_KEYS, and that is checked at the start.
        found: dict[str, list[str]] = {self.settings.keys_secret: []}
        if self.settings.direct_auth == "proxy":
            found[PROXY_SECRET] = ["MODAL_KEY", "MODAL_SECRET"]
        return found

    def function_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `@app.function` that are plain values."""
        options: dict[str, Any] = {
            "cpu": CPU,
            "memory": MEMORY_MB,
            "max_containers": 1,
            "scaledown_window": SCALEDOWN_WINDOW_S,
            "startup_timeout": STARTUP_TIMEOUT_S,
            "timeout": self.settings.request_timeout_s,
            "region": self.settings.region,  # near its tiers
            "enable_memory_snapshot": True,
        }
        return {name: value for name, value in options.items() if value is not None}


try:
    DEPLOYMENT = DoorDeployment.resolve()
except UsageError as error:
    raise SystemExit(error.to_terminal()) from None

if not modal.is_local():
    expect_many_streams()  # in the container, and before its checkpoint: it takes 35 ms, which no wake should

app = modal.App(DEPLOYMENT.app_name)


@app.function(
    image=with_settings(light_image(), DEPLOYMENT.settings, {}),
    secrets=[modal.Secret.from_name(name, required_keys=keys) for name, keys in DEPLOYMENT.secrets.items()],
    **DEPLOYMENT.function_options(),
)
@modal.concurrent(max_inputs=MAX_INPUTS)
@modal.asgi_app()
def serve() -> Door:
    """Return the gateway as an ASGI application."""
    return modal_gateway(DEPLOYMENT.settings, DEPLOYMENT.registry, os.environ)
