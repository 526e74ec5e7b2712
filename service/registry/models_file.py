"""Reads a models file: its `[models.<key>]` tables and its table `[aliases]`. `models.toml` here is such a file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.errors import RegistryError, one_line
from service.registry.entries import ModelSpec
from service.validation import explain

BUILT_IN = Path(__file__).with_name("models.toml")


def read(file: Path) -> tuple[dict[str, ModelSpec], dict[str, str]]:
    """Return the entries and the aliases of a models file."""
    try:
        table = tomllib.loads(file.read_text())
    except OSError as error:
        raise RegistryError(
            f"Models file '{file}' cannot be read: {error.strerror}.",
            hint="Set SERVICE_MODELS_FILE to a TOML file, or unset it.",
        ) from error
    except RecursionError as error:
        raise RegistryError(f"Models file '{file}' is not TOML that can be read: it is nested too deep.") from error
    except ValueError as error:  # TOML's, one of UTF-8, or a number of too many digits
        raise RegistryError(f"Models file '{file}' is not TOML: {one_line(error)}.") from error
    aliases = _aliases(file, table.pop("aliases", None))
    entries = table.pop("models", {} if aliases else None)
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
    return specs, aliases


def _aliases(file: Path, table: Any) -> dict[str, str]:
    if table is None:
        return {}
    if not isinstance(table, dict) or not all(isinstance(target, str) for target in table.values()):
        raise RegistryError(
            f"Models file '{file}': [aliases] is not a table of names.",
            hint='Write one such as "gpt-4o" = "qwen3-8b" for each name.',
        )
    return table


def _entry(file: Path, key: str, fields: Any) -> ModelSpec:
    if not isinstance(fields, dict):
        raise RegistryError(
            f"Models file '{file}', model '{key}': {fields!r} is not a table.",
            hint=f"Write [models.{key}] and its fields below.",
        )
    spec = ModelSpec.model_validate({"key": key, **_tuples(fields if file == BUILT_IN else _with_paths(file, fields))})
    if spec.task is None:
        pools = "classify" if "classify" in spec.extra_args else "embed" if "pooling" in spec.extra_args else None
        spec = spec.model_copy(update={"task": pools or "generate"})
    if file == BUILT_IN or spec.cpu_max_model_len:
        return spec
    # A built-in entry's context is what fits on the GPU that it names; an operator's is meant for this machine, too.
    return spec.model_copy(update={"cpu_max_model_len": spec.max_model_len})


def _with_paths(file: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with paths that are relative to the file that names them."""
    adapters = fields.get("adapters")
    for table in (fields, *(adapters if isinstance(adapters, list) else ())):
        path = table.get("path") if isinstance(table, dict) else None
        if isinstance(path, str) and path:
            table["path"] = str((file.parent / path).resolve())
    template = fields.get("chat_template")
    if isinstance(template, str) and (own := file.parent / template).is_file():
        fields["chat_template"] = str(own.resolve())
    return fields


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """Turn TOML's arrays into tuples, which is what frozen entries hold, and whole numbers into floats where due."""
    frozen: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    for name in ("weights_gb", "min_compute_capability"):
        if type(frozen.get(name)) is int:  # a bool is an int too
            frozen[name] = float(frozen[name])
    return frozen
