"""docs/trouble.md: what it says of vLLM's messages are vLLM's own words."""

from __future__ import annotations

from pathlib import Path

from tests.unit.test_trouble_docs import REPORTED, literals


def test_literals_of_vllm_are_in_its_source(engine_python: str) -> None:
    """Each part between what differs, in the release that is pinned."""
    (package,) = Path(engine_python).parents[1].glob("lib/python3*/site-packages/vllm")
    parts = [
        part for literal in literals("vLLM") if literal not in REPORTED for part in literal.split("…") if part.strip()
    ]
    missing = {part.strip() for part in parts}
    for directory in ("config", "v1", "platforms", "model_executor/models/registry.py"):
        place = package / directory
        for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
            text = file.read_text()
            missing = {part for part in missing if part not in text}
    assert len(parts) >= 9
    assert missing == set()
