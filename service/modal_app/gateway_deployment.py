"""What the deploy of the gateway publishes, from settings and registry alone: app name, secrets, function options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from service.gateway import webhook
from service.gateway.modal_pool import PROXY_SECRET
from service.gateway.tiers import tier_for
from service.modal_app.deployment import default_model
from service.registry.models import Registry
from service.registry.tiers import check_fit
from service.settings import Settings
from service.weights import revisions

APP = "vllm-gateway"
CPU, MEMORY_MB = 1.0, 1024
SCALEDOWN_WINDOW_S = 300  # idle it costs next to nothing; the first client after it waits for a container
STARTUP_TIMEOUT_S = 120


@dataclass(frozen=True)
class GatewayDeployment:
    """The resolved settings of the gateway. Identical on the deployer's machine and in the container."""

    settings: Settings
    registry: Registry

    @classmethod
    def resolve(cls) -> GatewayDeployment:
        """Read settings and registry.

        The settings of replicas (`min_containers`, `snapshot`, …) have no effect here: the deploys of the tiers read
        them. By `max_containers` and `max_inputs` the gateway knows when a pool is full.

        Raises:
            UsageError: A setting, the models file or the default model is wrong, or the model does not fit on its tier.
        """
        settings = Settings.load()
        registry = revisions.registry(settings.models_file)
        choice = default_model(settings, registry)
        check_fit(choice.spec, tier_for(settings, choice.spec, choice.gpu), lambda other: other.settings)
        return cls(settings, registry)

    @property
    def app_name(self) -> str:
        """Name of the app; with `SERVICE_APP` it is that name and `-gateway`."""
        return f"{self.settings.app}-gateway" if self.settings.app else APP

    @property
    def secrets(self) -> dict[str, list[str]]:
        """Name -> required keys of the secrets that the container gets."""
        # The keys' secret has API_KEY or API_KEYS, so neither can be required; the start checks it.
        found: dict[str, list[str]] = {self.settings.keys_secret: []}
        if self.settings.direct_auth == "proxy":
            found[PROXY_SECRET] = ["MODAL_KEY", "MODAL_SECRET"]
        if self.settings.webhook_secret:
            found[self.settings.webhook_secret] = [webhook.VARIABLE]
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
