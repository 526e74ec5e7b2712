"""Markers: what of a repository's revision is in the hub client's cache and has been verified. No connection is made.

A marker is written last, when every file that the engine reads was found to be what the hub says, and stands for all of
them: it is believed after a look at each file's size. Until then a partial one keeps what is verified already, and
tells that the files are not to be served. Both lie in the repository's own folder of the cache and go where it goes:
`<cache>/models--<owner>--<name>/vllm-service/<revision>[.partial].json`.

No file is flushed to the disk one by one: after a loss of power an unwritten file is shorter than its marker says.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from service.weights.files import Wanted, chosen

_VERSION = 1
_FOLDER = "vllm-service"


@dataclass(frozen=True)
class File:
    """A file as the hub lists it.

    Attributes:
        size: In bytes.
        checksum: `sha256:<hex>` of a large file's content, `git:<hex>` of a small one as git names it.
    """

    size: int
    checksum: str

    @property
    def blob(self) -> str:
        """The name of its content in the client's cache."""
        return self.checksum.partition(":")[2]


@dataclass(frozen=True)
class Marker:
    """A revision of a repository: all its files, and which of them are here and were verified."""

    hub_id: str
    revision: str
    files: Mapping[str, File]
    verified: frozenset[str] = frozenset()

    def chosen(self, wanted: Wanted) -> dict[str, File]:
        """Return the files that the engine reads."""
        return {path: self.files[path] for path in chosen(self.files, wanted)}

    def covers(self, wanted: Wanted) -> bool:
        """Tell whether all that the engine reads is verified and still has its size."""
        directory = snapshot(self.hub_id, self.revision)
        files = self.chosen(wanted)
        return bool(files) and all(
            path in self.verified and has_size(directory / path, file.size) for path, file in files.items()
        )


def hub_cache() -> Path:
    """Return where the hub's client keeps repositories, by the variables that it reads itself."""
    environ = os.environ
    if cache := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return _expanded(cache)
    home = environ.get("HF_HOME") or f"{environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return _expanded(home) / "hub"


def _expanded(path: str) -> Path:
    return Path(os.path.expandvars(path)).expanduser()


def repository(hub_id: str) -> Path:
    """Return a repository's folder in the cache."""
    return hub_cache() / _name(hub_id)


def snapshot(hub_id: str, revision: str) -> Path:
    """Return the directory that the engine is given: links to the contents of one revision."""
    return repository(hub_id) / "snapshots" / revision


def locks(hub_id: str) -> Path:
    """Return where the locks of a repository are, the client's own among them."""
    return hub_cache() / ".locks" / _name(hub_id)


def _name(hub_id: str) -> str:
    return f"models--{hub_id.replace('/', '--')}"


def newest_known(hub_id: str) -> str | None:
    """Return the commit that the newest revision was when the cache last heard of it."""
    with suppress(OSError):
        return (repository(hub_id) / "refs" / "main").read_text().strip() or None
    return None


def is_ours(hub_id: str, revision: str) -> bool:
    """Tell whether this service fetched the revision, or began to: then only a marker says that it is complete."""
    return is_begun(hub_id, revision) or read(hub_id, revision) is not None


def is_begun(hub_id: str, revision: str) -> bool:
    """Tell whether a fetch of this service began and did not end, or a file of it was found damaged."""
    return _path(hub_id, revision, partial=True).exists()


def read(hub_id: str, revision: str, *, partial: bool = False) -> Marker | None:
    """Return a revision's marker; an unreadable one is none."""
    return _load(_path(hub_id, revision, partial=partial))


def known(hub_id: str, revision: str) -> Marker | None:
    """Return all that is known to be verified, of the marker and the partial one together."""
    whole, part = read(hub_id, revision), read(hub_id, revision, partial=True)
    if whole is None or part is None:
        return whole or part
    return Marker(hub_id, revision, part.files, whole.verified | part.verified)


def write(marker: Marker, *, partial: bool = False) -> None:
    """Write a marker atomically; the whole one replaces the partial one, and goes when only a partial one is true."""
    target = _path(marker.hub_id, marker.revision, partial=partial)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "version": _VERSION,
        "hub_id": marker.hub_id,
        "revision": marker.revision,
        "files": {path: [file.size, file.checksum] for path, file in marker.files.items()},
        "verified": sorted(marker.verified),
    }
    draft = target.with_name(f"{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        draft.write_text(json.dumps(content, indent=1))
        draft.replace(target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    if not partial:
        _path(marker.hub_id, marker.revision, partial=True).unlink(missing_ok=True)
        for left in target.parent.glob(f"{marker.revision}.*.tmp"):  # by one that was killed
            left.unlink(missing_ok=True)


def distrust(marker: Marker, damaged: Iterable[str]) -> None:
    """Take files out of what is verified: the revision is not served until they were fetched again."""
    write(Marker(marker.hub_id, marker.revision, marker.files, marker.verified - set(damaged)), partial=True)
    _path(marker.hub_id, marker.revision, partial=False).unlink(missing_ok=True)


def remove(hub_id: str, revision: str) -> None:
    """Forget a revision."""
    for partial in (False, True):
        _path(hub_id, revision, partial=partial).unlink(missing_ok=True)


def all_marked() -> Iterator[tuple[str, str]]:
    """Return hub id and revision of all that this service fetched, or began to."""
    found = {}
    for path in sorted(hub_cache().glob(f"models--*/{_FOLDER}/*.json")):
        if marker := _load(path):
            found[marker.hub_id, marker.revision] = True
    return iter(found)


def has_size(path: Path, size: int) -> bool:
    """Tell whether a file is there, through links, and of that size."""
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _path(hub_id: str, revision: str, *, partial: bool) -> Path:
    return repository(hub_id) / _FOLDER / f"{revision}{'.partial' if partial else ''}.json"


def _load(path: Path) -> Marker | None:
    try:
        content = json.loads(path.read_text())
        if content["version"] != _VERSION:
            return None
        files = {name: File(size, checksum) for name, (size, checksum) in content["files"].items()}
        return Marker(content["hub_id"], content["revision"], files, frozenset(content["verified"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
