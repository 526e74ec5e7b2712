"""Settings: the only reader of `SERVICE_*`. Resolved once, at deploy; the image carries them to the container.

An unknown `SERVICE_` name is refused as much as a wrong value: a typo must not silently deploy the default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from service.errors import SettingsError, UnknownGpuError, did_you_mean
from service.registry.gpus import check_count, find_gpu

PREFIX = "SERVICE_"
_TEXTS = {
    "app": "a name of 1 to 64 letters, digits, dots, dashes and underscores",
    "volume_prefix": "1 to 40 letters, digits, dots, dashes and underscores",
    "region": "the name of a region, such as us or us-west",
}


class Settings(BaseModel):
    """Everything a deployment or a local run can be told, one `SERVICE_` variable a field.

    A field that is None takes the registry entry's value (`gpu`, `n_gpu`) or is derived (`app`, `hub_secret`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    app: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]{1,64}$", description="name of the Modal app")
    model: str = Field("qwen3-8b", min_length=1, description="a registry key, hub id or alias (vllm-service models)")
    gpu: str | None = Field(None, description="a GPU that Modal offers, such as H100")
    n_gpu: int | None = Field(None, ge=1, le=8, description="GPUs to spread the model over")
    fast_boot: bool | None = Field(
        None,
        description="skip compilation and CUDA graphs: boots faster, generates slower (default: unless gpu snapshot)",
    )
    snapshot: Literal["off", "cpu", "gpu"] = Field("cpu", description="where the memory snapshot is taken")
    scaledown_window: int = Field(900, ge=2, le=3600, description="seconds without a request before a replica stops")
    min_containers: int = Field(0, ge=0, le=1000, description="replicas that are always up")
    max_containers: int | None = Field(None, ge=1, le=1000, description="replicas at most")
    buffer_containers: int = Field(0, ge=0, le=1000, description="idle replicas kept ahead of load")
    max_inputs: int = Field(64, ge=1, le=1000, description="requests one replica takes at once")
    target_inputs: int | None = Field(
        None, ge=1, le=1000, description="requests a replica is meant to have; more scale up"
    )
    startup_timeout_s: int = Field(1800, ge=10, le=86400, description="seconds a boot may take")
    hang_s: int = Field(180, ge=10, le=86400, description="seconds an engine may give no token before it is replaced")
    request_timeout_s: int = Field(3600, ge=1, le=86400, description="seconds a request may take")
    region: str | None = Field(None, min_length=2, description="a Modal region; multiplies the price by 1.5 to 1.75")
    direct_auth: Literal["proxy", "keys"] = Field(
        "proxy", description="who refuses strangers: Modal's proxy, or the engine"
    )
    hold_s: int = Field(120, ge=0, le=3600, description="seconds the gateway holds a request for a cold pool")
    models_file: str | None = Field(None, description="a TOML file with models of your own")
    hub_secret: str | None = Field(None, description="Modal secret with HF_TOKEN, for gated models")
    keys_secret: str = Field("vllm-api-key", min_length=1, description="Modal secret with API_KEY or API_KEYS")
    volume_prefix: str | None = Field(
        None, pattern=r"^[A-Za-z0-9._-]{1,40}$", description="what the names of Modal's volumes begin with"
    )
    port: int = Field(8000, ge=1, le=65535, description="port of the API")

    @field_validator("gpu")
    @classmethod
    def _gpu_is_offered(cls, gpu: str | None) -> str | None:
        if gpu is None:
            return None
        try:
            return find_gpu(gpu).name
        except UnknownGpuError as error:
            raise SettingsError(f"SERVICE_GPU: {error}") from error

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.gpu and self.n_gpu:
            try:
                check_count(find_gpu(self.gpu), self.n_gpu)
            except UnknownGpuError as error:
                raise SettingsError(f"SERVICE_N_GPU: {error}") from error
        if self.target_inputs and self.target_inputs > self.max_inputs:
            raise SettingsError(
                f"SERVICE_TARGET_INPUTS={self.target_inputs} is above SERVICE_MAX_INPUTS={self.max_inputs}; "
                "lower the first or raise the second."
            )
        if self.max_containers and self.min_containers > self.max_containers:
            raise SettingsError(
                f"SERVICE_MIN_CONTAINERS={self.min_containers} is above SERVICE_MAX_CONTAINERS={self.max_containers}; "
                "lower the first or raise the second."
            )
        return self

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read `SERVICE_*` from `environ` (default: this process's environment).

        Raises:
            SettingsError: A name is unknown or a value outside its range; the sentence names both and the remedy.
        """
        environ = os.environ if environ is None else environ
        given = {name: value for name, value in environ.items() if name.startswith(PREFIX)}
        for name in given:
            _check_known(name)
        values = {name.removeprefix(PREFIX).lower(): value for name, value in given.items() if value != ""}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SettingsError(_sentence(error)) from error

    def to_env(self) -> dict[str, str]:
        """Return these settings as `SERVICE_` variables, as `load` reads them back; unset fields are left out."""
        dump = self.model_dump(exclude_none=True)
        return {PREFIX + name.upper(): str(value) for name, value in dump.items()}


def _check_known(name: str) -> None:
    known = {PREFIX + field.upper() for field in Settings.model_fields}
    if name not in known:
        near = did_you_mean(name, known)
        raise SettingsError(f"{name} is not a setting of this service.{near} Known: {', '.join(sorted(known))}.")


def _sentence(error: ValidationError) -> str:
    """Say the first of pydantic's complaints in this project's words."""
    detail = error.errors()[0]
    field, value = str(detail["loc"][0]), str(detail["input"])
    info = Settings.model_fields[field]
    name, expected = f"{PREFIX}{field.upper()}", f"{_expected(field)}{_hint(value, info)}"
    return f"{name}='{value}' is not {expected} Meaning: {info.description}."


def _expected(field: str) -> str:
    """Describe a field's valid values: `a whole number from 1 to 8`."""
    info = Settings.model_fields[field]
    types = get_args(info.annotation) or (info.annotation,)
    if bool in types:
        return "a switch (true or false)"
    if int in types:
        lowest, highest = _limits(info)
        return f"a whole number from {lowest} to {highest}"
    if isinstance(types[0], str):
        return "one of " + ", ".join(types)
    return _TEXTS[field]


def _limits(info: FieldInfo) -> tuple[int, int]:
    limits = {type(limit).__name__: limit for limit in info.metadata}
    return limits["Ge"].ge, limits["Le"].le


def _hint(value: str, info: FieldInfo) -> str:
    """Offer the number when somebody wrote a duration such as `2m` for a field of seconds."""
    units = {"s": 1, "m": 60, "h": 3600}
    if "seconds" not in str(info.description) or not value[:-1].isdecimal() or value[-1:] not in units:
        return "."
    seconds = int(value[:-1]) * units[value[-1]]
    lowest, highest = _limits(info)
    return f"; write {seconds}." if lowest <= seconds <= highest else "."
