"""The corpus: inputs that once did harm, a file each; every later find joins them.

A file has `why` (what it did), `path`, the `status` that it may have now, and a `body` for the tiny model, or its
`text`, a character a byte, where it is no JSON. `{"$repeat": [item, n]}` in a body stands for a list of n such items.
What costs the engine seconds is `costly` and seldom mutated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).with_name("corpus")


@dataclass(frozen=True)
class Member:
    """One input.

    Attributes:
        name: Of its file.
        body: Its fields, lists not yet repeated; empty where it is no JSON.
        text: Its bytes, where it is no JSON.
    """

    name: str
    path: str
    status: frozenset[int]
    body: Mapping[str, Any]
    text: bytes
    costly: bool

    def encoded(self, model: str) -> bytes:
        """Return the whole body for a model."""
        return self.text or json.dumps({"model": model, **expanded(self.body)}).encode()


def load() -> list[Member]:
    """Return all of them, by name."""
    return [_member(file.stem, json.loads(file.read_text())) for file in sorted(DIRECTORY.glob("*.json"))]


def _member(name: str, fields: Mapping[str, Any]) -> Member:
    return Member(
        *(name, fields["path"], frozenset(fields["status"]), fields.get("body", {})),
        text=fields.get("text", "").encode("latin-1"),
        costly=fields.get("costly", False),
    )


def expanded(value: Any, most: int | None = None) -> Any:
    """Return a body with its lists repeated, at most so many times."""
    if isinstance(value, Mapping):
        if "$repeat" in value:
            item, count = value["$repeat"]
            return [item] * min(count, count if most is None else most)
        return {name: expanded(inner, most) for name, inner in value.items()}
    return [expanded(inner, most) for inner in value] if isinstance(value, list) else value
