"""The directory through which containers get the modal client and its dependencies; Modal mounts its own.

Links the packages of the running environment. A distribution that is not installed as plain files is an error.
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

from .errors import ClientDirectoryError

_REQUIREMENT_NAME = re.compile(r"[A-Za-z0-9._-]+")


def client_directory(path: Path) -> Path:
    """Fill `path` with links to modal and all its requirements; return it. Idempotent."""
    path.mkdir(parents=True, exist_ok=True)
    for name in sorted(_closure("modal")):
        for source in _top_level(name):
            _link(path / source.name, source)
    return path


def _closure(name: str) -> set[str]:
    found: set[str] = set()
    pending = {name}
    while pending:
        current = pending.pop()
        found.add(current)
        pending |= _requirements(current) - found
    return found


def _requirements(name: str) -> set[str]:
    try:
        listed = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError as error:
        text = (
            f"Distribution {name!r}, which modal requires, is not installed here. Install modal into this environment."
        )
        raise ClientDirectoryError(text) from error
    names = {_normalised(line) for line in listed if "extra ==" not in line}
    return {name for name in names if _installed(name)}


def _normalised(requirement: str) -> str:
    match = _REQUIREMENT_NAME.match(requirement)
    if match is None:
        raise ClientDirectoryError(f"Requirement {requirement!r} has no name.")
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def _installed(name: str) -> bool:
    """Tell whether a requirement is installed; one whose environment marker is false here is not, and is not needed."""
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _top_level(name: str) -> set[Path]:
    distribution = importlib.metadata.distribution(name)
    if distribution.files is None:
        raise ClientDirectoryError(f"Distribution {name!r} lists no files; install it from a wheel.")
    tops = {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}
    base = Path(str(distribution.locate_file("")))
    return {base / top for top in tops if (base / top).exists()}


def _link(link: Path, target: Path) -> None:
    if link.is_symlink() and link.readlink() == target:
        return
    if not link.exists():
        link.symlink_to(target)
