"""What is known of a model before it is served: from this machine, the registry, or the hub, which is asked last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.engine.model_files import ModelFiles
from service.errors import WeightsError
from service.files import atomic_write
from service.planning.fit import PlannedModel
from service.registry.configs import known_config
from service.registry.models import ModelSpec
from service.weights import hub_cache
from service.weights.files import RepositorySpec, is_upload, model_repository, select_files
from service.weights.hub import hub_for
from service.weights.locks import LocalLock

_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"


def planned_model(spec: ModelSpec, *, offline: bool) -> PlannedModel:
    """Return what is known of a model.

    Args:
        spec: Its registry entry, or what stands for one.
        offline: Do not ask the hub.

    Raises:
        WeightsError: It is not known here, and the hub is not asked or does not tell.
    """
    files, weights_bytes = _files(spec, offline=offline)
    draft = spec.speculative
    return PlannedModel(
        spec=spec,
        config=files.config,
        weights_bytes=weights_bytes,
        max_model_len=files.max_model_len,
        draft_config=_known(draft.hub_id, draft.revision) if draft and draft.hub_id else None,
    )


def _files(spec: ModelSpec, *, offline: bool) -> tuple[ModelFiles, float]:
    """Return what a model's files say, and the size of its weights in bytes."""
    given = (spec.weights_gb or 0) * 1e9
    repository = model_repository(spec)
    if repository is None:
        assert spec.directory is not None  # noqa: S101 - a registry entry has a path or a repository
        return _read(spec.directory, given, f"'{spec.directory}' of model '{spec.key}'")
    config = _known(repository.hub_id, repository.revision)
    if config and given:
        return ModelFiles(config), given
    directory = _snapshot(repository.hub_id, repository.revision)
    size = given or (_weights_bytes(directory, _listed_bytes(repository.hub_id, directory.name)) if directory else 0.0)
    if directory and size:
        return _read(directory, size, repository.label)
    if offline or is_upload(repository.hub_id):
        raise WeightsError(
            f"The {'size of the weights' if config else 'shape'} of {repository.label} is not known on this machine.",
            hint="Fetch it here first: vllm-service prefetch. Or name its directory."
            if is_upload(repository.hub_id)
            else f"Without --offline the hub is asked for {'it' if config else 'its config.json'}.",
        )
    return _fetched(repository, given)


def _known(hub_id: str, revision: str | None) -> Mapping[str, Any] | None:
    """Return a repository's configuration: of the cache, else of the registry."""
    if (directory := _snapshot(hub_id, revision)) and (config := ModelFiles.read(directory).config):
        return config
    return known_config(hub_id)


def _snapshot(hub_id: str, revision: str | None) -> Path | None:
    """Return the directory of a revision, else of the newest one here, of which the cache has the configuration."""
    commits = [revision] if revision else [path.parent.name for path in _newest_first(hub_id)]
    directories = [hub_cache.snapshot(hub_id, commit) for commit in commits]
    return next((directory for directory in directories if (directory / _CONFIG).is_file()), None)


def _newest_first(hub_id: str) -> list[Path]:
    found = hub_cache.repository(hub_id).glob(f"snapshots/*/{_CONFIG}")
    return sorted(found, key=lambda path: path.lstat().st_mtime, reverse=True)


def _read(directory: Path, given: float, label: str) -> tuple[ModelFiles, float]:
    files = ModelFiles.read(directory)
    weights_bytes = given or _weights_bytes(directory)
    if not files.config or not weights_bytes:
        lacking = _CONFIG if not files.config else "safetensors"
        raise WeightsError(f"{label} has no {lacking} that can be read.", hint="Name a complete model.")
    return files, weights_bytes


def _weights_bytes(directory: Path, listed: float = 0.0) -> float:
    """Return the size of the weights: as the index tells it, else the hub, else the files, of which some may lack."""
    try:
        return float(json.loads((directory / _INDEX).read_text())["metadata"]["total_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return listed or float(ModelFiles.read(directory).weights_bytes)


def _listed_file(hub_id: str, revision: str) -> Path:
    """Return the file that has the size of a revision's weights, for models of one file, which have no index."""
    return hub_cache.repository(hub_id) / "vllm-service" / f"{revision}.weights-bytes"


def _listed_bytes(hub_id: str, revision: str) -> float:
    """Return the size of a revision's weights as the hub listed it once; 0 where it is not known."""
    try:
        return float(_listed_file(hub_id, revision).read_text())
    except (OSError, ValueError):
        return 0.0


def _fetched(repository: RepositorySpec, given: float) -> tuple[ModelFiles, float]:
    """Fetch the configuration and the index of the weights into the cache, and keep the size that the hub lists."""
    hub = hub_for(repository.hub_id)
    listed = hub.list_files(repository)
    wanted = [path for path in (_CONFIG, _INDEX) if path in listed.files]
    if _CONFIG not in wanted:
        raise WeightsError(f"{repository.label} has no {_CONFIG}.", hint="Name the repository of a model.")
    with LocalLock().held(repository.hub_id):
        hub.download(repository, listed.revision, wanted, lambda: 0)
    directory = hub_cache.snapshot(repository.hub_id, listed.revision)
    sizes = {path: listed.files[path].size for path in select_files(listed.files, repository)}
    weights = sum(size for path, size in sizes.items() if path.endswith(".safetensors"))
    if weights:
        atomic_write(_listed_file(repository.hub_id, listed.revision), str(weights).encode())
    return _read(directory, given or _weights_bytes(directory, weights), repository.label)
