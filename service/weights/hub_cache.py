"""The hub cache on this machine: huggingface_hub's own directory layout, which every hub fills. Makes no connection.

The layout is repeated here instead of imported: `huggingface_hub` reads its variables once, when it is imported, which
takes 3 ms for `constants` and 0.13 s for `repo_folder_name`; a replica whose weights are complete looks them up
in 4 ms without that import (bench/weights.py asserts it). A test compares `hub_cache` with the library's own answer.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path

from service.files import expand_user
from service.weights.files import RepositorySpec, is_upload, select_files

_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")  # one of several: only their index lists them all


def hub_cache() -> Path:
    """Return the directory that holds all repositories, by the variables that huggingface_hub reads."""
    environ = os.environ
    if cache := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return _expand(cache)
    home = environ.get("HF_HOME") or f"{environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return _expand(home) / "hub"


def repository(hub_id: str) -> Path:
    """Return a repository's directory in the cache."""
    return hub_cache() / _directory_name(hub_id)


def snapshot(hub_id: str, revision: str) -> Path:
    """Return the directory of one revision, which the engine reads: links to the files' contents."""
    return repository(hub_id) / "snapshots" / revision


def blobs(hub_id: str) -> Path:
    """Return the directory of the files' contents, each named by its checksum."""
    return repository(hub_id) / "blobs"


def listing(hub_id: str, revision: str) -> Path:
    """Return the file in which newer versions of huggingface_hub keep a revision's list of files."""
    return repository(hub_id) / "trees" / f"{revision}.json"


def newest_ref(hub_id: str) -> Path:
    """Return the file that names the newest revision's commit, as of the last visit to the hub."""
    return repository(hub_id) / "refs" / "main"


def locks(hub_id: str) -> Path:
    """Return the directory of a repository's lock files, huggingface_hub's own among them."""
    return hub_cache() / ".locks" / _directory_name(hub_id)


def newest_known(hub_id: str) -> str | None:
    """Return the commit that was the newest at the last visit to the hub; None if the cache has none."""
    with suppress(OSError):
        return newest_ref(hub_id).read_text().strip() or None
    return None


def has_size(path: Path, size: int) -> bool:
    """Tell whether a file exists, through links, and has that size."""
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def looks_complete(directory: Path, repository: RepositorySpec) -> bool:
    """Tell whether a snapshot that another program downloaded has all that the engine reads.

    It has no manifest and was not verified: its own index and the library's list of files decide. `fetch` verifies it.
    """
    try:
        return _has_weights(directory) and _has_listed_files(directory, repository)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def remove_unfinished(hub_id: str) -> None:
    """Delete what killed downloads left: huggingface_hub never resumes it. What is being written is locked."""
    from filelock import FileLock, Timeout  # noqa: PLC0415 - 23 ms, see locks.py

    directory = locks(hub_id)
    for part in blobs(hub_id).glob("*.incomplete"):
        directory.mkdir(parents=True, exist_ok=True)
        with suppress(OSError, Timeout), FileLock(directory / f"{part.name.partition('.')[0]}.lock", blocking=False):
            part.unlink()


def _expand(path: str) -> Path:
    return expand_user(os.path.expandvars(path))


def _directory_name(hub_id: str) -> str:
    if is_upload(hub_id):
        return f"uploads--{hub_id.partition(':')[2]}"
    return f"models--{hub_id.replace('/', '--')}"


def _has_weights(directory: Path) -> bool:
    """Look for the configuration and for every shard that the index names."""
    if (directory / "adapter_config.json").is_file():
        return (directory / "adapter_model.safetensors").is_file()
    if not (directory / "config.json").is_file():
        return False
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return all((directory / shard).is_file() for shard in set(json.loads(index.read_text())["weight_map"].values()))
    return any(file.is_file() and not _SHARD.search(file.name) for file in directory.glob("*.safetensors"))


def _has_listed_files(directory: Path, repository: RepositorySpec) -> bool:
    """Look for every file that the library's own list has, where there is one.

    Source: huggingface_hub 2.4, `_tree_cache.py`, format 1; a file of an unknown format counts as none.
    """
    file = listing(repository.hub_id, directory.name)
    if not file.is_file():
        return True
    content = json.loads(file.read_text())
    if content["format_version"] != 1:
        return True
    files = content["files"]
    return all(has_size(directory / path, files[path]["size"]) for path in select_files(files, repository))
