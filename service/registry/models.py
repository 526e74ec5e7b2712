"""The registry: all models by name. `models.toml` has the built-in entries, `entries` their fields.

A name is a key (`gemma-3-12b`), an alias, a hub id in any case, `llm` for the default model, or any of these with a GPU
behind it (`gemma-3-12b-h100`). The table `[aliases]` of a models file gives models further names, such as those that a
client has built in: `"claude-haiku-*" = "qwen3-4b"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from service.errors import RegistryError, UnknownModelError, did_you_mean
from service.files import expand_user
from service.registry.entries import Adapter, ModelSpec, Speculative
from service.registry.gpus import BY_SLUG, Gpu
from service.registry.models_file import BUILT_IN, read

__all__ = ["BUILT_IN", "Adapter", "ModelChoice", "ModelSpec", "Registry", "Speculative"]
DEFAULT_ALIAS = "llm"
LOCAL_SUFFIX = "-local"  # of a name in a request: the gateway tunes the request for tool calls


@dataclass(frozen=True)
class ModelChoice:
    """What a name means: a model, the GPU when the name ends in one, and the name without it, in lower case."""

    spec: ModelSpec
    gpu: Gpu | None = None
    name: str = ""


class Registry:
    """All models by name. Immutable once loaded.

    Args:
        specs: The entries by their keys.
        aliases: Further names -> the name of a model. One that ends in `*` stands for all names that begin so.

    Raises:
        RegistryError: Two models have the same name, or an alias is wrong.
    """

    def __init__(self, specs: dict[str, ModelSpec], aliases: Mapping[str, str] | None = None) -> None:
        self.specs, self.aliases = specs, dict(aliases or {})
        self._by_name: dict[str, ModelSpec] = {}
        claims = [
            (name, spec)
            for spec in specs.values()
            for name in (spec.key, *spec.aliases, *(adapter.name for adapter in spec.adapters))
        ]
        for name, spec in claims:
            self._by_name.setdefault(name.lower(), spec)
        for spec in specs.values():
            if spec.hub_id:  # two entries may serve one repository differently: its id means the first of them
                owner = self._by_name.setdefault(spec.hub_id.lower(), spec)
                if (owner.hub_id or "").lower() != spec.hub_id.lower():
                    raise _taken(spec.hub_id, owner, f"model '{spec.key}'")
        for name, spec in claims:
            self._check_name(name, spec)
        self._targets = {alias.lower(): target for alias, target in self.aliases.items()}
        for alias, target in self.aliases.items():
            self._check_alias(alias, target)
        for spec in specs.values():
            self._check_fallback(spec, ())

    def _check_name(self, name: str, spec: ModelSpec) -> None:
        """Refuse a name that means another model already, by itself or without the GPU or `-local` at its end."""
        stem = name.lower().removesuffix(LOCAL_SUFFIX)
        for bare in (name.lower(), stem, *(stem.removesuffix(f"-{slug}") for slug in BY_SLUG)):
            owner = self._by_name.get(bare, spec)
            if owner is not spec or bare == DEFAULT_ALIAS:
                other = f"model '{owner.key}'" if owner is not spec else "the default model"
                raise _taken(name, spec, other)

    def _check_alias(self, alias: str, target: str) -> None:
        if "*" in alias.removesuffix("*"):
            raise RegistryError(f"Alias '{alias}': '*' may only be its last character.", hint="Shorten it to one '*'.")
        if self._find(alias, "") or alias.lower() == DEFAULT_ALIAS:
            raise RegistryError(f"Alias '{alias}' is already a name of a model.", hint="Remove it.")
        if self._find(target, next(iter(self.specs), "")) is None:
            raise RegistryError(
                f"Alias '{alias}' means '{target}', which is no model.{did_you_mean(target, self._written)}",
                hint="Write the key, hub id or alias of an entry, or llm for the default model.",
            )

    def _check_fallback(self, spec: ModelSpec, before: tuple[str, ...]) -> None:
        """Refuse fallbacks that lead nowhere, or back to where they began; `before` are those that led to this one."""
        if spec.key in before:
            circle = " -> ".join((*before[before.index(spec.key) :], spec.key))
            raise RegistryError(f"The fallbacks of model '{spec.key}' lead back to it: {circle}.", hint="Remove one.")
        for name in spec.fallback:
            if (choice := self.find(name)) is None:
                near = did_you_mean(name, self._written)
                raise RegistryError(
                    f"Model '{spec.key}' has the fallback '{name}', which is no model.{near}",
                    hint="Write the key, hub id or alias of another entry.",
                )
            other = choice.spec
            if other.task != spec.task and other.task and spec.task:
                raise RegistryError(
                    f"Model '{spec.key}' has the fallback '{name}' of another task: {other.task}, not {spec.task}.",
                    hint="Name a model of the same task.",
                )
            self._check_fallback(other, (*before, spec.key))

    @classmethod
    def load(cls, models_file: str | Path | None = None) -> Registry:
        """Read the built-in models and then those of `models_file`, which may replace one by its key.

        Raises:
            RegistryError: The file is missing, is no TOML, or an entry is wrong; the error names entry and field.
        """
        specs, aliases = read(BUILT_IN)
        if models_file:
            own, aliases = read(expand_user(models_file))
            specs |= own
        try:
            return cls(specs, aliases)
        except RegistryError as error:
            raise RegistryError(f"Models file '{models_file or BUILT_IN}': {error.message}", hint=error.hint) from error

    def replace(self, specs: dict[str, ModelSpec]) -> Registry:
        """Return a registry of these entries with the same aliases."""
        return Registry(specs, self.aliases)

    def find(self, name: str, default: str | None = None) -> ModelChoice | None:
        """Return what `name` means, None when no model has it; `llm` means `default`."""
        return self._find(self._targets.get(name.lower(), name), default)

    def find_pattern(self, name: str, default: str | None = None) -> ModelChoice | None:
        """Return what the longest alias with a `*` that fits `name` means, None when none fits."""
        lowered = name.lower()
        fitting = [alias for alias in self._targets if alias.endswith("*") and lowered.startswith(alias[:-1])]
        return self._find(self._targets[max(fitting, key=len)], default) if fitting else None

    def resolve(self, name: str, default: str | None = None) -> ModelChoice:
        """Return what `name` means; `llm` means `default`.

        Raises:
            UnknownModelError: No entry has the name; the error offers the nearest.
        """
        if choice := self.find(name, default):
            return choice
        raise self.unknown(name)

    def unknown(self, name: str, spelled: str | None = None) -> UnknownModelError:
        """Return the error of a name that no model has; it offers the name nearest to `spelled` (default: `name`)."""
        return UnknownModelError(
            f"Unknown model '{name}'.{did_you_mean(spelled or name, self._written)} Registered: "
            f"{', '.join(self.specs)} (vllm-service models).",
            hint="Choose one of these, or set SERVICE_MODELS_FILE to a TOML file with an entry of your own.",
        )

    def _find(self, name: str, default: str | None) -> ModelChoice | None:
        lowered = name.lower()
        if lowered == DEFAULT_ALIAS and default:
            return self.resolve(default)
        if spec := self._by_name.get(lowered):
            return ModelChoice(spec, name=lowered)
        for slug, gpu in BY_SLUG.items():
            bare = lowered.removesuffix(f"-{slug}")
            if bare == DEFAULT_ALIAS and default:
                return ModelChoice(self.resolve(default).spec, gpu)
            if spec := self._by_name.get(bare):
                return ModelChoice(spec, gpu, bare)
        return None

    @property
    def _written(self) -> list[str]:
        """Every name as it is written."""
        own = [name for spec in self.specs.values() for name in (*spec.names, *(part.name for part in spec.adapters))]
        return [*own, *(alias for alias in self.aliases if not alias.endswith("*"))]


def _taken(name: str, claimant: ModelSpec, owner: str) -> RegistryError:
    return RegistryError(
        f"'{name}' of model '{claimant.key}' is already a name of {owner}.", hint="Choose another name."
    )


def unregistered(name: str) -> ModelSpec:
    """Return an entry for a hub id or model directory that is in no registry: vLLM's defaults, newest revision.

    Raises:
        UnknownModelError: It can be neither.
    """
    directory = expand_user(name)
    if (directory / "config.json").is_file():
        key = "".join(c if c.isalnum() else "-" for c in directory.resolve().name.lower()).strip("-")
        return ModelSpec(key=key or "model", path=str(directory.resolve()))
    try:
        return ModelSpec(key=name.rpartition("/")[2].lower().replace("_", "-"), hub_id=name)
    except ValidationError as error:
        raise UnknownModelError(
            f"'{name}' is neither a hub id such as Qwen/Qwen3-8B-FP8 nor a directory with a config.json.",
            hint="'vllm-service models' lists the registered models.",
        ) from error


def resolve_or_source(registry: Registry, name: str, default: str | None = None) -> ModelChoice:
    """Return what `name` means, or an entry for a hub id or model directory that is in no registry.

    Raises:
        UnknownModelError: It is neither.
    """
    try:
        return registry.resolve(name, default)
    except UnknownModelError:
        if not looks_like_a_source(name):
            raise
        return ModelChoice(unregistered(name))


def looks_like_a_source(name: str) -> bool:
    """Tell whether `name` could be a hub id or a model directory rather than a mistyped key."""
    return name.count("/") == 1 or (expand_user(name) / "config.json").is_file()
