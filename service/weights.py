"""Weights: from the hub into the cache, once; offline from then on.

The cache is huggingface_hub's own (`HF_HOME`, by default `~/.cache/huggingface`): on Modal a volume, on a laptop shared
with every other program that uses the hub. What is complete there is used without asking the hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from service import fetch
from service.errors import WeightsError
from service.models import ModelSpec

_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")  # one of several: only their index tells which all are


@dataclass(frozen=True)
class Weights:
    """Directories the engine reads: the model's, and its draft model's where the entry has one.

    Attributes:
        model: The model's directory.
        draft: The draft model's.
        fetched: They came from the hub just now, so a cache that others share has something new.
    """

    model: Path
    draft: Path | None = None
    fetched: bool = False


def find(spec: ModelSpec) -> Weights | None:
    """Return the weights of `spec` when all of them are here; no connection is made."""
    if spec.directory:
        return Weights(_existing(spec.directory, spec.key))
    assert spec.hub_id is not None  # noqa: S101 - a registry entry has a path or a hub id
    model = _cached(spec.hub_id, spec.revision, spec.ignore_patterns)
    draft_id = spec.speculative.hub_id if spec.speculative else None
    draft = _cached(draft_id, spec.speculative.revision, ()) if spec.speculative and draft_id else None
    if model is None or (draft_id and draft is None):
        return None
    return Weights(model, draft)


def ensure(spec: ModelSpec, token: str | None = None, say: Callable[[str], None] = lambda _: None) -> Weights:
    """Return the weights of `spec`, fetching what is missing; finished files of an earlier attempt are kept.

    Args:
        spec: The registry entry.
        token: The hub's token, for gated models.
        say: Called with a sentence when a download begins.

    Raises:
        GatedModelError: The hub wants a token of somebody who accepted the model's licence.
        DiskSpaceError: The cache has too little room for what is missing.
        WeightsError: The hub cannot be reached, or has no such repository or revision.
    """
    if weights := find(spec):
        return weights
    assert spec.hub_id is not None  # noqa: S101 - entries with a path were answered above
    model = fetch.in_child(fetch.Wanted(spec.hub_id, spec.revision, spec.ignore_patterns), token, say)
    draft = None
    if spec.speculative and spec.speculative.hub_id:
        draft = fetch.in_child(fetch.Wanted(spec.speculative.hub_id, spec.speculative.revision), token, say)
    return Weights(model, draft, fetched=True)


def _existing(directory: Path, key: str) -> Path:
    if not (directory / "config.json").is_file():
        raise WeightsError(
            f"'{directory}' of model '{key}' has no config.json. Give the directory of a model, or a hub_id."
        )
    return directory


def _cached(hub_id: str, revision: str | None, ignore: tuple[str, ...]) -> Path | None:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only hub models need it
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        path = snapshot_download(
            hub_id, revision=revision, local_files_only=True, ignore_patterns=[*fetch.OTHER_FORMATS, *ignore]
        )
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    return Path(path) if _complete(Path(path)) else None


def _complete(directory: Path) -> bool:
    """Check that the configuration and every shard that the index names are there, whoever filled the cache."""
    if not (directory / "config.json").is_file():
        return False
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return all((directory / shard).is_file() for shard in set(json.loads(index.read_text())["weight_map"].values()))
    return any(file.is_file() and not _SHARD.search(file.name) for file in directory.glob("*.safetensors"))
