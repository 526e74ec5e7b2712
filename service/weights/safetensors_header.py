"""The header of a safetensors file: name, type, shape and place of each tensor. The numbers behind it are not read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a file's header says.

    Attributes:
        shapes: Of each tensor, by its name.
        whole_size: How many bytes the file has when it was written whole.
    """

    shapes: dict[str, tuple[int, ...]]
    whole_size: int


def read_header(file: Path) -> SafetensorsHeader | None:
    """Return a file's header; None: it has none.

    Raises:
        OSError: The file cannot be read.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= _MAX_HEADER:
            return None
        try:
            header = json.loads(opened.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            shapes = {name: tuple(map(int, entry.get("shape", ()))) for name, entry in tensors.items()}
            ends = [int(entry["data_offsets"][1]) for entry in tensors.values()]
        except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError):
            return None
    return SafetensorsHeader(shapes, 8 + length + max(ends, default=0))
