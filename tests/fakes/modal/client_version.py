"""Which modal clients the plane supports: the release that the project pins, and newer patch releases of it.

Imports nothing of modal: the check comes before the import of the client's private modules, which a newer release may
have moved.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

_PROJECT = Path(__file__).parents[3] / "pyproject.toml"
_PIN = "modal=="
_RELEASE = re.compile(r"(\d+)\.(\d+)\.(\d+)")


def _pinned() -> str:
    dependencies: list[str] = tomllib.loads(_PROJECT.read_text())["project"]["dependencies"]
    return next(line.removeprefix(_PIN) for line in dependencies if line.startswith(_PIN))


PINNED = _pinned()


def why_refused(version: str) -> str | None:
    """Return in one line why a client of that version is not supported; None where it is."""
    found, pinned = _numbers(version), _numbers(PINNED)
    if found[:2] == pinned[:2] and found >= pinned:
        return None
    works = f"{PINNED} and newer patch releases of {pinned[0]}.{pinned[1]}"
    step = f"Install modal=={PINNED}, or move the pin in pyproject.toml and run tests/fakes against the other client."
    return f"The modal client found is {version or 'of no version'}; the plane for tests works with {works}. {step}"


def _numbers(version: str) -> tuple[int, ...]:
    match = _RELEASE.match(version)
    return tuple(map(int, match.groups())) if match else ()
