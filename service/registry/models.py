"""The registry: the models, and how the engine runs each. The data is in `models.toml`, the rules are here.

A name is a key (`gemma-3-12b`), an alias, a hub id in any case, `llm` for the default model, or any of these with a GPU
behind it (`gemma-3-12b-h100`).
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from service.errors import RegistryError, UnknownModelError, did_you_mean
from service.registry.gpus import BY_SLUG, GPUS, Gpu, check_count, find_gpu
from service.registry.tiers import Tier
from service.validation import explain

BUILT_IN = Path(__file__).with_name("models.toml")
DEFAULT_ALIAS = "llm"
_KEY = r"^[a-z0-9][a-z0-9.-]*$"
_HUB_ID = r"^(?:[a-z0-9-]+:)?[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*$"
_REVISION = r"^[0-9a-f]{40}$"
_ONE_SOURCE = "give exactly one of hub_id (a repository on the hub) and path (a directory)."


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Speculative(_Entry):
    """Speculative decoding: the served model verifies the tokens of a draft, several a step, with the same output."""

    method: Literal["eagle", "eagle3", "mtp", "ngram", "draft_model"]
    num_speculative_tokens: int = Field(ge=1, le=32)
    hub_id: str | None = Field(None, pattern=_HUB_ID)
    revision: str | None = Field(None, pattern=_REVISION)


class Adapter(_Entry):
    """A LoRA adapter that is served beside its model, under its own name."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    hub_id: str | None = Field(None, pattern=_HUB_ID)
    path: str | None = Field(None, min_length=1)
    revision: str | None = Field(None, pattern=_REVISION)

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.hub_id is None) == (self.path is None):
            raise RegistryError(f"adapter '{self.name}': {_ONE_SOURCE}")
        return self

    @property
    def directory(self) -> Path | None:
        """Where the adapter lies when it does not come from the hub."""
        return None if self.path is None else Path(__file__).parents[1] / self.path


class ModelSpec(_Entry):
    """One registry entry. Names of engine options are vLLM's own.

    Attributes:
        key: Short name; the first of the names that responses carry.
        hub_id: Repository on the hub; exactly one of `hub_id` and `path` is set.
        path: Directory with the model, relative to this package unless absolute.
        revision: Commit that is served, 40 hexadecimal digits.
        gpu: GPU that Modal runs it on, unless `SERVICE_GPU` says otherwise.
        weights_gb: What the engine reads, in 10^9 bytes.
        max_model_len: Longest prompt and answer together, in tokens; None leaves it to the model's own configuration.
        ignore_patterns: Files of the repository that are not fetched.
        adapters: LoRA adapters, each served under its own name.
        max_lora_rank: The largest rank of the adapters; memory is set aside for it.
        extra_args: Further arguments of `vllm serve`, passed as they are.
    """

    key: str = Field(pattern=_KEY)
    hub_id: str | None = Field(None, pattern=_HUB_ID)
    path: str | None = Field(None, min_length=1)
    revision: str | None = Field(None, pattern=_REVISION)
    aliases: tuple[str, ...] = ()
    gated: bool = False
    gpu: str = "H100"
    n_gpu: int = Field(1, ge=1, le=8)
    weights_gb: float | None = Field(None, gt=0)
    max_model_len: int | None = Field(None, ge=16)
    modalities: tuple[Literal["text", "image", "video", "audio"], ...] = ("text",)
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    chat_template: str | None = None
    kv_cache_dtype: str | None = None
    moe_backend: str | None = None
    async_scheduling: bool | None = None
    fusion_passes: tuple[str, ...] = ()
    limit_mm_per_prompt: dict[str, int] = {}
    speculative: Speculative | None = None
    adapters: tuple[Adapter, ...] = ()
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 64
    ignore_patterns: tuple[str, ...] = ()
    extra_args: tuple[str, ...] = ()

    @field_validator("gpu")
    @classmethod
    def _gpu_is_offered(cls, gpu: str) -> str:
        return find_gpu(gpu).name

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if (self.hub_id is None) == (self.path is None):
            raise RegistryError(_ONE_SOURCE)
        taken = {name.lower() for name in self.names}
        for adapter in self.adapters:
            if adapter.name.lower() in taken:
                raise RegistryError(
                    f"adapter '{adapter.name}' has a name that the entry uses already.", hint="Choose another."
                )
            taken.add(adapter.name.lower())
        check_count(GPUS[self.gpu], self.n_gpu)
        return self

    @property
    def tier(self) -> Tier:
        """The entry's own GPU tier."""
        return Tier(GPUS[self.gpu], self.n_gpu)

    @property
    def directory(self) -> Path | None:
        """Where the model lies when it does not come from the hub."""
        return None if self.path is None else Path(__file__).parents[1] / self.path

    @property
    def names(self) -> tuple[str, ...]:
        """Every name of the model itself: key, hub id, aliases."""
        return (self.key, *([self.hub_id] if self.hub_id else []), *self.aliases)

    @property
    def repositories(self) -> tuple[tuple[str, str | None], ...]:
        """Hub id and revision of its repositories: model, draft, adapters."""
        parts: list[ModelSpec | Speculative | Adapter] = [self, *self.adapters]
        if self.speculative:
            parts.insert(1, self.speculative)
        return tuple((part.hub_id, part.revision) for part in parts if part.hub_id)


@dataclass(frozen=True)
class ModelChoice:
    """What a name means: a model, the GPU when the name ends in one, and the name without it, in lower case."""

    spec: ModelSpec
    gpu: Gpu | None = None
    name: str = ""


class Registry:
    """All models by name. Immutable once loaded."""

    def __init__(self, specs: dict[str, ModelSpec]) -> None:
        self.specs = specs
        self._by_name: dict[str, ModelSpec] = {}
        for spec in specs.values():
            for name in (spec.key, *spec.aliases, *(adapter.name for adapter in spec.adapters)):
                self._claim(name, spec)
        for spec in specs.values():
            if spec.hub_id:  # two entries may serve one repository differently: its id means the first of them
                owner = self._by_name.setdefault(spec.hub_id.lower(), spec)
                if (owner.hub_id or "").lower() != spec.hub_id.lower():
                    raise _taken(spec.hub_id, owner, f"model '{spec.key}'")

    def _claim(self, name: str, spec: ModelSpec) -> None:
        owner = self._by_name.setdefault(name.lower(), spec)
        if owner is not spec or name.lower() == DEFAULT_ALIAS:
            other = f"model '{owner.key}'" if owner is not spec else "the default model"
            raise _taken(name, spec, other)

    @classmethod
    def load(cls, models_file: str | Path | None = None) -> Registry:
        """Read the built-in models and then those of `models_file`, which may replace one by its key.

        Raises:
            RegistryError: The file is missing, is no TOML, or an entry is wrong; the error names entry and field.
        """
        specs = _read(BUILT_IN)
        if models_file:
            specs |= _read(Path(models_file).expanduser())
        try:
            return cls(specs)
        except RegistryError as error:
            raise RegistryError(f"Models file '{models_file or BUILT_IN}': {error.message}", hint=error.hint) from error

    def resolve(self, name: str, default: str | None = None) -> ModelChoice:
        """Return what `name` means; `llm` means `default`.

        Raises:
            UnknownModelError: No entry has the name; the error offers the nearest.
        """
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
        written = [name for spec in self.specs.values() for name in (*spec.names, *(own.name for own in spec.adapters))]
        raise UnknownModelError(
            f"Unknown model '{name}'.{did_you_mean(name, written)} Registered: {', '.join(self.specs)} "
            "(vllm-service models).",
            hint="Choose one of these, or set SERVICE_MODELS_FILE to a TOML file with an entry of your own.",
        )


def _taken(name: str, claimant: ModelSpec, owner: str) -> RegistryError:
    return RegistryError(
        f"'{name}' of model '{claimant.key}' is already a name of {owner}.", hint="Choose another name."
    )


def unregistered(name: str) -> ModelSpec:
    """Return an entry for a hub id or model directory that is in no registry: vLLM's defaults, newest revision.

    Raises:
        UnknownModelError: It can be neither.
    """
    directory = Path(name).expanduser()
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


def looks_like_a_source(name: str) -> bool:
    """Tell whether `name` could be a hub id or a model directory rather than a mistyped key."""
    return name.count("/") == 1 or (Path(name).expanduser() / "config.json").is_file()


def _read(file: Path) -> dict[str, ModelSpec]:
    try:
        table = tomllib.loads(file.read_text())
    except OSError as error:
        raise RegistryError(
            f"Models file '{file}' cannot be read: {error.strerror}.",
            hint="Set SERVICE_MODELS_FILE to a TOML file, or unset it.",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RegistryError(f"Models file '{file}' is not TOML: {error}.") from error
    entries = table.pop("models", None)
    if table or not isinstance(entries, dict):
        stray = f"holds '{next(iter(table))}' at its top" if table else "has no [models.<key>] table"
        raise RegistryError(f"Models file '{file}' {stray}.", hint="Write one [models.<key>] table for each model.")
    specs: dict[str, ModelSpec] = {}
    wrong: list[str] = []
    for key, fields in entries.items():
        try:
            specs[key] = _entry(file, key, fields)
        except ValidationError as error:
            wrong += (f"model '{key}': {sentence}" for sentence in explain(error, ModelSpec))
    if wrong:
        sentences = " Also, ".join(wrong)
        raise RegistryError(f"Models file '{file}', {sentences}", hint="docs/models.md describes every field.")
    return specs


def _entry(file: Path, key: str, fields: Any) -> ModelSpec:
    if not isinstance(fields, dict):
        raise RegistryError(
            f"Models file '{file}', model '{key}': {fields!r} is not a table.",
            hint=f"Write [models.{key}] and its fields below.",
        )
    adapters = fields.get("adapters")
    for table in (fields, *(adapters if isinstance(adapters, list) else ())):
        path = table.get("path") if isinstance(table, dict) else None
        if isinstance(path, str) and path and file != BUILT_IN:
            table["path"] = str((file.parent / path).resolve())  # relative to the file that names it
    return ModelSpec.model_validate({"key": key, **_tuples(fields)})


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """Turn TOML's arrays into tuples, which is what frozen entries hold, and whole numbers into weights."""
    frozen: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    if type(frozen.get("weights_gb")) is int:  # a bool is an int too
        frozen["weights_gb"] = float(frozen["weights_gb"])
    return frozen
