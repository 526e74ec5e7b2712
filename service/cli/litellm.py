"""The configuration of a LiteLLM proxy in front of the gateway: every model under its names, one URL, one key.

Pure: a registry in, a document out. No key is ever in it; LiteLLM reads the two it needs from its own environment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from service.errors import ServiceError, UsageError
from service.registry.gpus import Gpu, find_gpu
from service.registry.models import DEFAULT_ALIAS, ModelSpec, Registry
from service.registry.tiers import tier_of
from service.settings import Settings

GATEWAY_KEY = "os.environ/VLLM_API_KEY"
MASTER_KEY = "os.environ/LITELLM_MASTER_KEY"
_LOCAL_SUFFIX = "-local"
_FROM_ENVIRONMENT = re.compile(r"os\.environ/[A-Za-z_][A-Za-z0-9_]*")
_HEADER = """\
# Written by `vllm-service litellm`; write it again after a change of the registry. It holds no key: LiteLLM reads
# VLLM_API_KEY (a key of the gateway) and LITELLM_MASTER_KEY (what its own clients send) from its environment.
"""


def api_base(url: str) -> str:
    """Return the `api_base` of a gateway's URL, with or without `/v1` at its end.

    `os.environ/NAME`, which LiteLLM reads from its environment, stays as it is: that variable then ends in `/v1`.

    Raises:
        UsageError: It is no http URL, or it may hold a secret; then the message does not repeat it.
    """
    if _FROM_ENVIRONMENT.fullmatch(url):
        return url
    try:
        parts = urlsplit(url)
        host = parts.hostname and (parts.port or True)  # a port that is no number raises
    except ValueError:
        host = None
    if "@" in url or "?" in url or "#" in url:
        raise UsageError(
            "The gateway's URL has a user, a query or a fragment, which may be a secret: this file must not hold one.",
            hint="Give scheme, host and port alone, such as https://<workspace>--vllm-gateway-serve.modal.run.",
        )
    if not host or parts.scheme not in {"http", "https"} or re.search(r"\s", url):
        raise UsageError(
            f"'{url}' is not the URL of a gateway.",
            hint="Give scheme, host and port, such as http://127.0.0.1:8000, or os.environ/NAME for a variable that "
            "LiteLLM reads it from.",
        )
    return url.rstrip("/").removesuffix("/v1") + "/v1"


def config(
    registry: Registry, url: str, settings: Settings, gpus: Sequence[str] = (), *, local: bool = False
) -> dict[str, Any]:
    """Return the configuration: `model_list` with one entry a name, and settings that fit a pool that may be cold.

    Args:
        registry: Whose models are listed.
        url: Of the gateway.
        settings: Where the timeouts come from.
        gpus: Further GPUs, beside each model's own, on which those models are listed whose weights fit.
        local: List `<key>-local` too.

    Raises:
        UsageError: The URL is wrong, or Modal offers no such GPU.
    """
    base, further = api_base(url), [find_gpu(gpu) for gpu in gpus]
    patience_s = settings.hold_s + settings.request_timeout_s  # held until the pool is awake, and then answered
    return {
        "model_list": [_entry(name, base) for name in _names(registry, further, local)],
        "litellm_settings": {"drop_params": False, "num_retries": 0, "request_timeout": patience_s},
        "router_settings": {
            "num_retries": 0,  # the gateway waits and clients retry: a third layer would multiply both
            "timeout": patience_s,
            "stream_timeout": patience_s,
            "disable_cooldowns": True,  # one gateway stands behind all names; it reports by itself what is unavailable
        },
        "general_settings": {"master_key": MASTER_KEY, "health_check_skip_disabled_background_models": True},
    }


def as_yaml(config: dict[str, Any]) -> str:
    """Return the configuration as YAML, with a header that says where it comes from."""
    return _HEADER + yaml.safe_dump(config, sort_keys=False)


def as_json(config: dict[str, Any]) -> str:
    """Return the configuration as JSON, which LiteLLM reads as well."""
    return json.dumps(config, indent=2) + "\n"


def write(text: str, file: Path) -> None:
    """Write the configuration to a file.

    Raises:
        ServiceError: The file cannot be written.
    """
    try:
        file.write_text(text)
    except OSError as error:
        raise ServiceError(
            f"'{file}' cannot be written: {error.strerror}.", hint="Name a file in a directory that you may write to."
        ) from error


def too_large(registry: Registry, gpus: Iterable[str]) -> list[str]:
    """Return the names that are left out: the model's weights alone are more than that GPU's memory."""
    further = dict.fromkeys(map(find_gpu, gpus))
    return [f"{spec.key}-{gpu.slug}" for spec in registry.specs.values() for gpu in further if not _holds(gpu, spec)]


def _names(registry: Registry, further: list[Gpu], local: bool) -> Iterator[str]:
    yield DEFAULT_ALIAS
    for spec in registry.specs.values():
        gpus = dict.fromkeys([spec.tier.gpu, *(gpu for gpu in further if _holds(gpu, spec))])
        for name in (spec.key, *(adapter.name for adapter in spec.adapters)):
            yield name
            yield from (f"{name}-{gpu.slug}" for gpu in gpus)
            if local:
                yield name + _LOCAL_SUFFIX


def _holds(gpu: Gpu, spec: ModelSpec) -> bool:
    """Tell whether the tier that `<key>-<gpu>` means has room for the weights; an entry's own is not doubted."""
    return gpu == spec.tier.gpu or tier_of(spec, gpu).holds(spec)


def _entry(name: str, base: str) -> dict[str, Any]:
    return {
        "model_name": name,
        "litellm_params": {"model": f"openai/{name}", "api_base": base, "api_key": GATEWAY_KEY},
        # LiteLLM's GET /health asks every model for an answer, which would start a GPU for each
        "model_info": {"disable_background_health_check": True},
    }
