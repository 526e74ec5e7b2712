"""What a registry entry may say: its fields, and the rules among them. docs/models.md describes every field."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from service.errors import RegistryError
from service.registry import extra_args
from service.registry.gpus import GPUS, check_count, find_gpu
from service.registry.tiers import Tier
from service.validation import explain

KEY = r"^[a-z0-9][a-z0-9.-]*$"
MAX_UPLOAD_NAME = 96
_HUB_ID = r"^(?:[a-z0-9-]+:)?[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*$"
_REVISION = r"^[0-9a-f]{40}$"
_ONE_SOURCE = "give exactly one of hub_id (a repository on the hub), volume (an upload) and path (a directory)."
UPLOADS = "volume"  # the hub of what was uploaded: an upload's hub_id is `volume:<name>`
_MAX_CPU_LORAS = 8  # of an entry with adapters that does not say otherwise


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Sourced(_Entry):
    """What a model and an adapter have in common: where their files come from."""

    hub_id: str | None = Field(None, pattern=_HUB_ID)
    volume: str | None = Field(None, pattern=KEY, max_length=MAX_UPLOAD_NAME)
    path: str | None = Field(None, min_length=1)
    revision: str | None = Field(None, pattern=_REVISION)

    @property
    def repository(self) -> str | None:
        """The hub id by which its files are in the cache, `volume:<name>` for an upload; None: a directory."""
        return f"{UPLOADS}:{self.volume}" if self.volume else self.hub_id

    @property
    def directory(self) -> Path | None:
        """Where it lies when it is neither on the hub nor an upload."""
        return None if self.path is None else Path(__file__).parents[1] / self.path

    @property
    def _has_one_source(self) -> bool:
        return [self.hub_id, self.volume, self.path].count(None) == 2


class Speculative(_Entry):
    """Speculative decoding: the served model verifies the tokens of a draft, several a step, with the same output."""

    method: Literal["eagle", "eagle3", "mtp", "ngram", "draft_model"]
    num_speculative_tokens: int = Field(ge=1, le=32)
    hub_id: str | None = Field(None, pattern=_HUB_ID)
    revision: str | None = Field(None, pattern=_REVISION)


class Adapter(_Sourced):
    """A LoRA adapter that is served beside its model, under its own name."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")

    @model_validator(mode="after")
    def _comes_from_one_place(self) -> Self:
        if not self._has_one_source:
            raise RegistryError(f"adapter '{self.name}': {_ONE_SOURCE}")
        return self


class TokenPrices(_Entry):
    """What the operator charges for tokens, in dollars per million."""

    input: float = Field(ge=0)
    cached: float | None = Field(None, ge=0)
    output: float = Field(ge=0)


class ModelSpec(_Sourced):
    """One registry entry. Names of engine options are vLLM's own.

    Attributes:
        key: Short name; the first of the names that responses carry.
        hub_id: Repository on the hub; exactly one of `hub_id`, `volume` and `path` is set.
        volume: Name of a model that `vllm-service upload` put on Modal's volume.
        path: Directory with the model, relative to this package unless absolute.
        revision: Commit of the repository or revision of the upload that is served, 40 hexadecimal digits.
        gpu: GPU that Modal runs it on, unless `SERVICE_GPU` says otherwise.
        max_containers: Most replicas of its pool, unless `SERVICE_MAX_CONTAINERS` says otherwise; None: one.
        task: What the model does, by vLLM's name; None, in no registry: not known before its engine runs.
        weights_gb: What the engine reads, in 10^9 bytes.
        min_compute_capability: The least that vLLM has kernels of its quantisation for; None: any that vLLM runs on.
        max_model_len: Longest prompt and answer together, in tokens; None leaves it to the model's own configuration.
        cpu_max_model_len: The same on a machine without a GPU; None: 8192, or the model's own where that is shorter.
        ignore_patterns: Files of the repository that are not fetched.
        adapters: LoRA adapters, each served under its own name.
        max_lora_rank: The largest rank of the adapters; memory is set aside for it.
        max_cpu_loras: The most adapters that its engine has; None: 8, or none where the entry has no adapters.
        price: What callers pay for tokens, in place of a share of the replica's cost; None: the share.
        fallback: Names of models that answer while this one's pool is cold, failed or full, in this order.
        fallback_default: Whether they may answer a request that does not say so itself.
        extra_args: Further arguments of `vllm serve`, passed as they are; see `extra_args.REFUSED`.
    """

    key: str = Field(pattern=KEY)
    aliases: tuple[str, ...] = ()
    gated: bool = False
    gpu: str = "H100"
    n_gpu: int = Field(1, ge=1, le=8)
    max_containers: int | None = Field(None, ge=1, le=1000)
    task: Literal["generate", "embed", "classify", "transcription"] | None = None
    weights_gb: float | None = Field(None, gt=0)
    min_compute_capability: float | None = Field(None, ge=5, lt=100)
    max_model_len: int | None = Field(None, ge=16)
    cpu_max_model_len: int | None = Field(None, ge=16)
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
    max_cpu_loras: int | None = Field(None, ge=1, le=64)
    ignore_patterns: tuple[str, ...] = ()
    price: TokenPrices | None = None
    fallback: tuple[str, ...] = ()
    fallback_default: Literal["allow", "deny"] = "deny"
    extra_args: tuple[str, ...] = ()

    @field_validator("gpu")
    @classmethod
    def _gpu_is_offered(cls, gpu: str) -> str:
        return find_gpu(gpu).name

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if not self._has_one_source:
            raise RegistryError(_ONE_SOURCE)
        taken = {name.lower() for name in self.names}
        for adapter in self.adapters:
            if adapter.name.lower() in taken:
                raise RegistryError(
                    f"adapter '{adapter.name}' has a name that the entry uses already.", hint="Choose another."
                )
            taken.add(adapter.name.lower())
        if self.max_cpu_loras and len(self.adapters) > self.max_cpu_loras:
            raise RegistryError(
                f"it has {len(self.adapters)} adapters, and max_cpu_loras = {self.max_cpu_loras}.",
                hint="Raise max_cpu_loras (at most 64), or remove an adapter.",
            )
        check_count(GPUS[self.gpu], self.n_gpu)
        extra_args.check(self.extra_args)
        self._check_trust()
        return self

    def _check_trust(self) -> None:
        """Refuse to run code of a repository whose commit the entry does not pin: who owns it could change the code."""
        if not extra_args.trusts_code(self.extra_args):
            return
        if self.hub_id is None or not all(revision for _, revision in self.repositories):
            raise RegistryError(
                f"extra_args: {extra_args.TRUST} runs code of the model's repository, and the entry does not pin its "
                "commit.",
                hint="Read the code at a commit; then give model and draft their hub_id and that commit as revision.",
            )

    @property
    def tier(self) -> Tier:
        """The entry's own GPU tier."""
        return Tier(GPUS[self.gpu], self.n_gpu)

    @property
    def adapter_room(self) -> int:
        """The most adapters that its engine has, those that are loaded while it serves included; 0: it takes none."""
        return self.max_cpu_loras or (max(_MAX_CPU_LORAS, len(self.adapters)) if self.adapters else 0)

    @property
    def chat_template_file(self) -> Path | None:
        """The template that replaces the model's own."""
        return None if self.chat_template is None else Path(__file__).parents[1] / self.chat_template

    @property
    def names(self) -> tuple[str, ...]:
        """Every name of the model itself: key, hub id, aliases."""
        return (self.key, *([self.hub_id] if self.hub_id else []), *self.aliases)

    @property
    def repositories(self) -> tuple[tuple[str, str | None], ...]:
        """Hub id and revision of its repositories and uploads: model, draft, adapters."""
        draft = self.speculative
        parts = [
            (self.repository, self.revision),
            *([(draft.hub_id, draft.revision)] if draft else []),
            *((adapter.repository, adapter.revision) for adapter in self.adapters),
        ]
        return tuple((hub_id, revision) for hub_id, revision in parts if hub_id)


def with_adapter(spec: ModelSpec, adapter: Adapter) -> ModelSpec:
    """Return an entry with one more adapter.

    Raises:
        RegistryError: Its engine takes none, or no more, or a name of the entry is the adapter's.
    """
    if not spec.adapter_room:
        raise RegistryError(
            f"Model '{spec.key}' takes no adapters: its entry has none, and no max_cpu_loras.",
            hint=f"Write max_cpu_loras = {_MAX_CPU_LORAS} into its entry and reload: its next engine has room.",
        )
    if len(spec.adapters) >= spec.adapter_room:
        raise RegistryError(
            f"Model '{spec.key}' has {len(spec.adapters)} adapters, which is all that its engine has room for.",
            hint="Raise max_cpu_loras (at most 64) in its entry and reload, or remove an adapter.",
        )
    try:
        return ModelSpec.model_validate({**dict(spec), "adapters": (*spec.adapters, adapter)})
    except ValidationError as error:
        sentences = " ".join(explain(error, ModelSpec))
        raise RegistryError(f"Model '{spec.key}': {sentences}", hint="Choose another name.") from error
