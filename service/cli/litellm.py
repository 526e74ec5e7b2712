"""The configuration of a LiteLLM proxy in front of the gateway: every model under its names, one URL, one key.

Pure: a registry in, a document out. No key is ever in it; LiteLLM reads the two it needs from its own environment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from service.cli import config_files
from service.cli.config_files import Change
from service.errors import ServiceError
from service.files import require_writable
from service.modal_app.gateway_access import base_url
from service.registry.gpus import Gpu, find_gpu
from service.registry.models import DEFAULT_ALIAS, LOCAL_SUFFIX, ModelSpec, Registry
from service.registry.tiers import tier_of
from service.settings import Settings

GATEWAY_KEY = "os.environ/VLLM_API_KEY"
MASTER_KEY = "os.environ/LITELLM_MASTER_KEY"
# LiteLLM's GET /health asks every model for an answer, which would start a GPU for each
_MODEL_INFO = {"disable_background_health_check": True}
_FROM_ENVIRONMENT = re.compile(r"os\.environ/[A-Za-z_][A-Za-z0-9_]*")
_HEADER = """\
# Written by `vllm-service litellm`; write it again after a change of the registry. It holds no key: LiteLLM reads
# VLLM_API_KEY (a key of the gateway) and LITELLM_MASTER_KEY (what its own clients send) from its environment.
"""


def api_base(url: str) -> str:
    """Return the `api_base` of a gateway's URL.

    `os.environ/NAME`, which LiteLLM reads from its environment, stays as it is: that variable then ends in `/v1`.

    Raises:
        UsageError: It is no http URL, or it may hold a secret.
    """
    return url if _FROM_ENVIRONMENT.fullmatch(url) else f"{base_url(url)}/v1"


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


def change(config: dict[str, Any], file: Path, *, in_json: bool = False) -> Change:
    """Return how a file becomes this configuration; models of other services, and settings besides these, stay in it.

    Raises:
        UsageError: The file cannot be written.
        ServiceError: It cannot be read, or not be understood, or it has comments, which would be lost.
    """
    bases = {entry["litellm_params"]["api_base"] for entry in config["model_list"]}

    def merge(before: str) -> str:
        document = config_files.load_yaml(before)
        others = [entry for entry in document.get("model_list") or () if not _is_ours(entry, bases)]
        config_files.merge_mappings(document, {**config, "model_list": [*config["model_list"], *others]})
        return as_json(document) if in_json else as_yaml(document)

    require_writable(file, is_replaced=True)
    found = config_files.plan(file, merge, config_files.load_yaml)
    if found.names and (line := _comment_line(found.before or "")):
        raise ServiceError(
            f"Line {line} of '{file}' has a comment, which would be lost.",
            hint="Take its comments out, or add by hand what the command prints without --output.",
        )
    return found


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
                yield name + LOCAL_SUFFIX
    yield from (alias for alias in registry.aliases if not alias.endswith("*"))


def _holds(gpu: Gpu, spec: ModelSpec) -> bool:
    """Tell whether the tier that `<key>-<gpu>` means has room for the weights; an entry's own is not doubted."""
    return gpu == spec.tier.gpu or tier_of(spec, gpu).holds(spec)


def _comment_line(text: str) -> int | None:
    """Return the number of the first line with a comment that no run of this command has written."""
    if text.startswith(_HEADER):
        text = "\n" * _HEADER.count("\n") + text.removeprefix(_HEADER)
    return config_files.yaml_comment_line(text)


def _is_ours(entry: Any, bases: set[str]) -> bool:
    """Tell whether an earlier run has written an entry: for this gateway, or another one that the file was for."""
    if not isinstance(entry, dict) or (given := entry.get("litellm_params") or {}).get("api_key") != GATEWAY_KEY:
        return False
    return given.get("api_base") in bases or entry.get("model_info") == _MODEL_INFO


def _entry(name: str, base: str) -> dict[str, Any]:
    return {
        "model_name": name,
        "litellm_params": {"model": f"hosted_vllm/{name}", "api_base": base, "api_key": GATEWAY_KEY},
        "model_info": dict(_MODEL_INFO),
    }
