"""Weights: from the hub into the cache, once; offline from then on.

The cache is huggingface_hub's own (`HF_HOME`, by default `~/.cache/huggingface`): on Modal a volume, on a laptop shared
with every other program that uses the hub. What is complete there is used without asking the hub.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import GatedModelError, WeightsError
from service.hardware import check_room
from service.models import ModelSpec

HUB_TIMEOUT_S = 3.0
# The engine reads safetensors; the same weights in other formats would only cost time and room.
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.ot", "onnx/*", "openvino/*")

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
    model = _fetch(spec.hub_id, spec.revision, spec.ignore_patterns, token, say)
    draft = None
    if spec.speculative and spec.speculative.hub_id:
        draft = _fetch(spec.speculative.hub_id, spec.speculative.revision, (), token, say)
    return Weights(model, draft, fetched=True)


def hub_in_reach() -> bool:
    """Tell whether the hub answers within a few seconds."""
    import requests  # noqa: PLC0415 - 90 ms that only this question costs

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:  # as huggingface_hub reads it
        return False
    try:
        requests.head(_endpoint(), timeout=HUB_TIMEOUT_S, allow_redirects=False)
    except requests.RequestException:
        return False
    return True


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


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
        path = snapshot_download(hub_id, revision=revision, local_files_only=True, ignore_patterns=_ignored(ignore))
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


def _fetch(
    hub_id: str, revision: str | None, ignore: tuple[str, ...], token: str | None, say: Callable[[str], None]
) -> Path:
    from huggingface_hub import constants, snapshot_download  # noqa: PLC0415 - only hub models need it
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision}" if revision else ""
    advice = "Check the connection (HF_ENDPOINT names another hub), or serve 'tiny', which needs none."
    if not hub_in_reach():  # the client would try again for half a minute
        raise WeightsError(f"{hub_id}{at} cannot be fetched from {_endpoint()}: it is not in reach. {advice}")
    try:
        missing = _missing_bytes(hub_id, revision, _ignored(ignore), token)
        check_room(Path(constants.HF_HUB_CACHE), missing / 1e9, hub_id, "set HF_HOME to a directory on a larger disk")
        say(f"Fetching {hub_id}{at}: {missing / 1e9:.1f} GB")
        return Path(snapshot_download(hub_id, revision=revision, ignore_patterns=_ignored(ignore), token=token))
    except GatedRepoError as error:
        raise GatedModelError(_gated(hub_id, token)) from error
    except RevisionNotFoundError as error:
        raise WeightsError(f"{hub_id} has no revision '{revision}'. Correct the entry's revision.") from error
    except RepositoryNotFoundError as error:
        raise WeightsError(
            f"The hub has no repository '{hub_id}', or it is private and the token has no access. "
            f"Look it up at {_endpoint()}/{hub_id}."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise WeightsError(
            f"{hub_id}{at} cannot be fetched from {_endpoint()}: {_first_line(error)} {advice}"
        ) from error


def _missing_bytes(hub_id: str, revision: str | None, ignore: list[str], token: str | None) -> int:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only hub models need it
    from huggingface_hub.errors import DryRunError  # noqa: PLC0415
    from huggingface_hub.utils.tqdm import tqdm  # noqa: PLC0415

    class Silent(tqdm):
        """No bar for asking sizes."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    try:
        plan = snapshot_download(
            hub_id, revision=revision, ignore_patterns=ignore, token=token, dry_run=True, tqdm_class=Silent
        )
    except DryRunError as error:
        raise error.__cause__ or error from None  # what kept it from the repository says more
    return sum(file.file_size or 0 for file in plan if file.will_download)


def _gated(hub_id: str, token: str | None) -> str:
    page = f"{_endpoint()}/{hub_id}"
    if token:
        return f"{hub_id} is gated and this token has no access. Accept its licence at {page} with the token's account."
    return (
        f"{hub_id} is gated and no token is here. Accept its licence at {page}, then set HF_TOKEN (locally) or "
        "create the secret: modal secret create huggingface HF_TOKEN=<token>."
    )


def _ignored(own: tuple[str, ...]) -> list[str]:
    return [*_OTHER_FORMATS, *own]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
