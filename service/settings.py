"""Settings: the only reader of `SERVICE_*`. Resolved once, at deploy; the image carries them to the container.

A typo of a setting's name is an error, as a wrong value is: it must not silently deploy the default. Other `SERVICE_`
names are ignored with a warning, since platforms set such variables themselves.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from service.errors import SettingsError, UnknownGpuError, edit_distance
from service.registry.gpus import check_count, find_gpu

_log = logging.getLogger(__name__)
PREFIX = "SERVICE_"
DATABASE_URL = f"{PREFIX}DATABASE_URL"  # no field: it has a password, and the image holds all fields
# A name is a typo of a setting's name within one edit, and within two edits of a name with 8 characters or more. So
# Coolify's SERVICE_FQDN_APP and Kubernetes's SERVICE_SERVICE_HOST are none.
_LONG_NAME = 8
_ORIGIN = r"[A-Za-z][A-Za-z0-9+.-]*://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]+)?"
_HOST = r"(\[?[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*\]?|[A-Za-z0-9._-]+)"
_EXPECTED_TEXTS = {
    "allowed_hosts": "a list of host names or addresses without a port, separated by commas",
    "app": "a name of 1 to 64 letters, digits, dots, dashes and underscores",
    "cors_origins": "a list of origins such as https://app.example.com, without a path, separated by commas; or *",
    "volume_prefix": "1 to 40 letters, digits, dots, dashes and underscores",
    "region": "the name of a region, such as us or us-west",
}


class Settings(BaseModel):
    """All settings of a deployment or a local run, one `SERVICE_` variable a field.

    A field that is None takes the registry entry's value (`gpu`, `n_gpu`, `max_containers`), is derived (`app`,
    `hub_secret`), or is left to Modal or vLLM (`region`, `target_inputs`).
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
    max_containers: int | None = Field(None, ge=1, le=1000, description="most replicas of one pool")
    max_gpus: int | None = Field(None, ge=1, le=1000, description="GPUs of all pools that the gateway may wake")
    max_dollars_per_day: int | None = Field(
        None, ge=1, le=1_000_000, description="dollars that the GPUs of all pools may cost in a day (UTC)"
    )
    buffer_containers: int = Field(0, ge=0, le=1000, description="idle replicas kept ahead of load")
    max_inputs: int = Field(64, ge=1, le=1000, description="requests one replica takes at once")
    target_inputs: int | None = Field(
        None, ge=1, le=1000, description="requests per replica to aim for; above it Modal starts another"
    )
    startup_timeout_s: int = Field(1800, ge=10, le=86400, description="seconds a boot may take")
    hang_s: int = Field(180, ge=10, le=86400, description="seconds an engine may generate no token before it is killed")
    request_timeout_s: int = Field(3600, ge=1, le=86400, description="seconds a request may take")
    region: str | None = Field(None, min_length=2, description="a Modal region; multiplies the price by 1.5 to 1.75")
    direct_auth: Literal["proxy", "keys"] = Field(
        "proxy", description="who authenticates direct requests: Modal's proxy, or the engine"
    )
    hold_s: int = Field(120, ge=0, le=3600, description="seconds the gateway holds a request for a cold pool")
    max_held: int = Field(500, ge=1, le=100_000, description="most requests held for one pool that is not ready")
    max_held_per_key: int = Field(200, ge=1, le=100_000, description="most requests of one key held")
    keep_alive_s: int = Field(620, ge=2, le=3600, description="seconds an idle connection of a client stays open")
    max_n: int = Field(16, ge=1, le=200, description="most answers to one request (n, best_of)")
    models_file: str | None = Field(None, description="a TOML file with models of your own")
    hub_secret: str | None = Field(None, description="Modal secret with HF_TOKEN, for gated models")
    keys_secret: str = Field("vllm-api-key", min_length=1, description="Modal secret with API_KEY or API_KEYS")
    webhook_secret: str | None = Field(
        None, min_length=1, description="Modal secret with WEBHOOK_URL, which is told what costs money or stays broken"
    )
    volume_prefix: str | None = Field(
        None, pattern=r"^[A-Za-z0-9._-]{1,40}$", description="prefix of the names of Modal's volumes"
    )
    cors_origins: str | None = Field(
        None, pattern=rf"^({_ORIGIN}( *, *{_ORIGIN})*|\*)$", description="origins whose web pages may use the API"
    )
    allowed_hosts: str | None = Field(
        None,
        pattern=rf"^{_HOST}( *, *{_HOST})*$",
        description="names that a service without keys answers to, beside localhost",
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
            raise SettingsError(f"SERVICE_GPU: {error.message}", hint=error.hint) from error

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if errors := list(self._contradictions()):
            raise _join(errors)
        return self

    def _contradictions(self) -> Iterator[SettingsError]:
        if self.gpu and self.n_gpu:
            try:
                check_count(find_gpu(self.gpu), self.n_gpu)
            except UnknownGpuError as error:
                yield SettingsError(f"SERVICE_N_GPU: {error.message}", hint=error.hint)
        for lower, upper in (("target_inputs", "max_inputs"), ("min_containers", "max_containers")):
            low, high = getattr(self, lower), getattr(self, upper)
            if low and high and low > high:
                below, above = PREFIX + lower.upper(), PREFIX + upper.upper()
                yield SettingsError(f"{below}={low} is above {above}={high}.", hint=f"Lower {below} or raise {above}.")

    def most_replicas(self, of_entry: int | None = None) -> int:
        """Return how many replicas a pool may have: what is set, else what its entry says, else one.

        Where replicas are always up or kept ahead of load, it is at least so many.
        """
        return self.max_containers or max(of_entry or 1, self.min_containers) + self.buffer_containers

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read `SERVICE_*` from `environ` (default: this process's environment).

        Raises:
            SettingsError: Names are typos of settings' names, or values are invalid; the error lists all of them.
        """
        environ = os.environ if environ is None else environ
        given = {name: value for name, value in environ.items() if name.startswith(PREFIX) and name != DATABASE_URL}
        _drop_kubernetes_port(given)
        errors, values = _by_field(given)
        settings = None
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            errors += map(_setting_error, error.errors())
        if settings is None or errors:
            raise _join(errors)
        return settings

    def to_env(self) -> dict[str, str]:
        """Return these settings as `SERVICE_` variables, as `load` reads them back; unset fields are left out."""
        dump = self.model_dump(exclude_none=True)
        return {PREFIX + name.upper(): str(value) for name, value in dump.items()}


def database_url(environ: Mapping[str, str]) -> str | None:
    """Return the URL of the PostgreSQL database for keys and usage; None: SQLite on this machine."""
    return environ.get(DATABASE_URL, "").strip() or None


def _by_field(given: Mapping[str, str]) -> tuple[list[SettingsError], dict[str, str]]:
    """Return what is wrong with the names of these variables, and the values of the fields they set."""
    variables = {PREFIX + field.upper(): field for field in Settings.model_fields}
    errors, ignored = [], []
    for name in given.keys() - variables.keys():
        if near := _mistyped(name.removeprefix(PREFIX).lower()):
            known = ", ".join(sorted(variables))
            hint = f"Did you mean '{PREFIX}{near.upper()}'? Known: {known}."
            errors.append(SettingsError(f"{name} is not a setting of this service.", hint=hint))
        else:
            ignored.append(name)
    if ignored:
        _log.warning("Ignored, because this service has no such settings: %s.", ", ".join(sorted(ignored)))
    return errors, {field: given[name] for name, field in variables.items() if given.get(name)}


def _mistyped(name: str) -> str | None:
    """Return the field whose name this is a typo of; None when it is none."""
    distances = {field: edit_distance(name, field) for field in Settings.model_fields}
    near = [field for field, edits in distances.items() if edits <= (2 if len(field) >= _LONG_NAME else 1)]
    return min(near, key=distances.__getitem__, default=None)


def _drop_kubernetes_port(given: dict[str, str]) -> None:
    """Count SERVICE_PORT as unset where Kubernetes set it, to the address of a Service that is named `service`."""
    name = PREFIX + "PORT"
    if given.get(name, "").startswith("tcp://"):
        _log.warning(
            "%s=%s counts as unset: Kubernetes sets it for a Service named 'service'. To set the port yourself, write "
            "enableServiceLinks: false into the pod's spec.",
            name,
            given.pop(name),
        )


def _join(errors: Iterable[SettingsError]) -> SettingsError:
    """Return one error that lists all of these."""
    errors = list(errors)
    hints = dict.fromkeys(error.hint for error in errors if error.hint)
    return SettingsError(" ".join(error.message for error in errors), hint=" ".join(hints))


def _setting_error(detail: Any) -> SettingsError:
    """Turn one of pydantic's errors into one that names the variable, its value and what was expected."""
    if detail["type"] == "value_error":  # one of our own validators raised it
        error: SettingsError = detail["ctx"]["error"]
        return error
    field, value = str(detail["loc"][0]), str(detail["input"])
    info, name = Settings.model_fields[field], f"{PREFIX}{str(detail['loc'][0]).upper()}"
    message = f"{name}='{value}' is not {_expected(field)}. Meaning: {info.description}."
    return SettingsError(message, hint=_hint(name, value, info))


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
    return _EXPECTED_TEXTS.get(field, "text in UTF-8")  # it takes any text: what is wrong are its bytes


def _limits(info: FieldInfo) -> tuple[int, int]:
    limits = {type(limit).__name__: limit for limit in info.metadata}
    return limits["Ge"].ge, limits["Le"].le


def _hint(name: str, value: str, info: FieldInfo) -> str:
    """Return the next step for a duration such as `2m`; else an empty string."""
    units = {"s": 1, "m": 60, "h": 3600}
    if "seconds" not in str(info.description) or not value[:-1].isdecimal() or value[-1:] not in units:
        return ""
    seconds = int(value[:-1]) * units[value[-1]]
    lowest, highest = _limits(info)
    return f"Write {name}={seconds}." if lowest <= seconds <= highest else ""
