"""Which files of a model's directory the engine's loader reads, and in which order. Looks at names and the index."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files that the loader reads, in its order.

    Source: vLLM 0.32, `DefaultModelLoader._prepare_weights` (`consolidated` files, Mistral's, go before all others),
    `filter_duplicate_safetensors_files` (an index leaves out what it does not name) and `_natural_sort_key`.

    Raises:
        OSError: The directory or its index cannot be read.
        ValueError: The index is not one.
    """
    names = [entry.name for entry in os.scandir(directory) if entry.name.endswith(".safetensors")]
    consolidated = [name for name in names if name.startswith("consolidated")]
    index = directory / f"{'consolidated' if consolidated else 'model'}.safetensors.index.json"
    wanted = _named_by(index) if index.is_file() else set(names)
    chosen = [name for name in consolidated or names if name in wanted]
    return [directory / name for name in sorted(chosen, key=_natural)]


def _named_by(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text())["weight_map"].values())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} has no weight_map of names and files") from error


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
