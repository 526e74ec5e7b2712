"""Digests of what a deploy publishes: equal ones mean that nothing would change.

They are kept as the tag of the app's version at Modal, so a rollback brings back those of the version that it goes back
to. A digest has parts, so that a deploy can say what has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import modal

from service import otel
from service.registry.models import BUILT_IN, ModelSpec
from service.settings import Settings

PACKAGE = Path(__file__).parents[1]
PARTS = ("settings", "entries", "code")
_TAG = re.compile(r"([0-9a-f]{8})-([0-9a-f]{8})-([0-9a-f]{8})-([0-9a-f]{8})-([0-9a-f]{12})")
_NOT_CODE = {"cli", "__pycache__"}  # nothing that runs in a container imports cli
_GATEWAYS_OWN = {  # settings that tiers do not read
    "hold_s", "max_held", "max_held_per_key", "cors_origins", "allowed_hosts", "keep_alive_s",
    "max_gpus", "max_dollars_per_day", "webhook_secret",
}  # fmt: skip
_TIERS_OWN = {
    "snapshot", "fast_boot", "hang_s", "min_containers", "buffer_containers", "target_inputs", "hub_secret",
    "port",
}  # fmt: skip
_ENGINES_OWN = {
    "volume",
    "revision",
    "gated",
    "cpu_max_model_len",
    "tool_call_parser",
    "reasoning_parser",
    "chat_template",
    "kv_cache_dtype",
    "moe_backend",
    "async_scheduling",
    "fusion_passes",
    "limit_mm_per_prompt",
    "speculative",
    "max_lora_rank",
    "ignore_patterns",
    "extra_args",
}  # fmt: skip - fields of an entry that the gateway does not read


@dataclass(frozen=True)
class Digest:
    """What an app was deployed from.

    Attributes:
        settings: The settings that it reads.
        entries: The registry entries that it is there for.
        code: The package, and Modal's client.
        registry: All entries. Of a tier it does not count on its own: a change there must not cost its snapshots.
        run: Which deploy made it; later ones sort behind earlier ones.
    """

    settings: str
    entries: str
    code: str
    registry: str
    run: str = ""

    @classmethod
    def of_tier(cls, settings: Settings, own: list[ModelSpec], everything: list[ModelSpec]) -> Digest:
        """Return the digest of a tier that is there for the entries `own`."""
        read = _read(settings, _GATEWAYS_OWN)
        return cls(_hash(read), _hash(_dump(own)), code(), _hash(_dump(everything)))

    @classmethod
    def of_gateway(cls, settings: Settings, everything: list[ModelSpec], aliases: dict[str, str]) -> Digest:
        """Return the digest of the gateway, which knows all entries."""
        read = _read(settings, _TIERS_OWN)
        entries = [aliases, *_dump(everything, _ENGINES_OWN)]
        return cls(_hash(read), _hash(entries), code(), _hash(entries))

    @classmethod
    def parse(cls, tag: str) -> Digest | None:
        """Return the digest of a version's tag; None: the version was not made by `vllm-service deploy`."""
        return cls(*match.groups()) if (match := _TAG.fullmatch(tag)) else None

    def of_run(self, run: str) -> Digest:
        """Return it as that of a deploy."""
        return replace(self, run=run)

    def tag(self) -> str:
        """Return it as Modal takes it: 50 characters at most."""
        return "-".join((self.settings, self.entries, self.code, self.registry, self.run))

    def changes_since(self, before: Digest) -> tuple[str, ...]:
        """Return the parts that differ."""
        return tuple(part for part in PARTS if getattr(self, part) != getattr(before, part))


def new_run() -> str:
    """Return the name of a deploy that begins now: when, in parts of 2**-16 s."""
    return f"{int(time.time() * 2**16):012x}"


@cache
def code() -> str:
    """Return the digest of what containers run: the package without the registry's entries, and Modal's client."""
    found = hashlib.sha256(modal.__version__.encode())
    entries = {BUILT_IN, BUILT_IN.with_suffix(".lock.toml")}
    for file in sorted(PACKAGE.rglob("*")):
        if file.is_file() and not _NOT_CODE & set(file.relative_to(PACKAGE).parts) and file not in entries:
            found.update(f"{file.relative_to(PACKAGE)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()[:8]


def _read(settings: Settings, less: set[str]) -> dict[str, Any]:
    """Return what an app reads of the deployer's environment: settings, and OpenTelemetry's variables."""
    return settings.model_dump(mode="json", exclude=less | {"models_file"}) | otel.variables(os.environ)


def _dump(specs: list[ModelSpec], less: set[str] | None = None) -> list[Any]:
    return [spec.model_dump(mode="json", exclude=less) for spec in sorted(specs, key=lambda spec: spec.key)]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
