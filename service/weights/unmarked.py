"""What somebody else brought into the cache, such as `hf download`: used where it looks complete. Makes no connection.

It was not verified by this service, and has no marker; a fetch verifies it and gives it one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from service.weights.files import Wanted, chosen
from service.weights.manifest import has_size, repository

_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")  # one of several: only their index tells which all are


def is_complete(directory: Path, wanted: Wanted) -> bool:
    """Tell whether a snapshot has all that the engine reads, as far as its own files and the client's listing tell."""
    try:
        return _has_weights(directory) and _has_listed(directory, wanted)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _has_weights(directory: Path) -> bool:
    """Look for the configuration and every shard that the index names, whoever filled the cache."""
    if (directory / "adapter_config.json").is_file():
        return any((directory / f"adapter_model.{suffix}").is_file() for suffix in ("safetensors", "bin"))
    if not (directory / "config.json").is_file():
        return False
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return all((directory / shard).is_file() for shard in set(json.loads(index.read_text())["weight_map"].values()))
    return any(file.is_file() and not _SHARD.search(file.name) for file in directory.glob("*.safetensors"))


def _has_listed(directory: Path, wanted: Wanted) -> bool:
    """Look for every file of the repository's listing, which newer clients keep beside the snapshots.

    Source: huggingface_hub 2.4, `_tree_cache.py`, format 1; an unknown format is no listing.
    """
    listing = repository(wanted.hub_id) / "trees" / f"{directory.name}.json"
    if not listing.is_file():
        return True
    content = json.loads(listing.read_text())
    if content["format_version"] != 1:
        return True
    files = content["files"]
    return all(has_size(directory / path, files[path]["size"]) for path in chosen(files, wanted))
