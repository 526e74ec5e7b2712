"""The `config.json` of models that the registry names, for plans without a hub; configs/README.md has their sources."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).with_name("configs")


def known_config(hub_id: str) -> Mapping[str, Any] | None:
    """Return architecture and numbers of a repository's model; None: they are not known here."""
    file = file_of(hub_id)
    return dict(json.loads(file.read_text())) if file.is_file() else None


def file_of(hub_id: str) -> Path:
    """Return the file of a repository."""
    return DIRECTORY / f"{hub_id.replace('/', '--')}.json"
