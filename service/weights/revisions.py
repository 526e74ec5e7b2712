"""Which commit an entry means that names none: settled once, recorded, and the same for everybody from then on.

What counts, in this order: the entry's own `revision`; the lock file beside the registry, which a deploy carries into
every replica; the record in the cache (on Modal the volume, which all replicas share); and only then the hub.
"""

from __future__ import annotations

import fcntl
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from service.errors import RegistryError, ServiceError, WeightsError
from service.registry.models import BUILT_IN, ModelSpec, Registry
from service.weights import huggingface, manifest
from service.weights.huggingface_errors import endpoint

if TYPE_CHECKING:
    from service.weights.locks import Lock

Resolve = Callable[[str], str]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HEAD = """\
# The commits of models whose entries name no revision, so that everybody who has this file serves the same.
# 'vllm-service models --pin' adds what is missing; 'vllm-service prefetch <model> --update' takes the newest instead.
[revisions]
"""


def lock_file(models_file: str | Path | None) -> Path:
    """Return the lock file beside the registry: `my-models.lock.toml` beside `my-models.toml`."""
    return (Path(models_file).expanduser() if models_file else BUILT_IN).with_suffix(".lock.toml")


def cache_record() -> Path:
    """Return the record beside the hub's cache, which the hub's client does not know of."""
    return manifest.hub_cache().parent / "vllm-service.revisions.toml"


def registry(models_file: str | Path | None) -> Registry:
    """Read the registry with what the lock files settle; nothing is asked of the hub.

    Raises:
        RegistryError: The models file or a lock file is wrong.
    """
    files = dict.fromkeys((lock_file(None), lock_file(models_file)))
    commits = {hub_id: commit for file in files for hub_id, commit in read(file).items()}
    return at(Registry.load(models_file), commits)


def at(loaded: Registry, commits: Mapping[str, str]) -> Registry:
    """Return the registry with these commits where an entry names none."""
    return Registry({key: pinned(spec, commits) for key, spec in loaded.specs.items()})


def pinned(spec: ModelSpec, commits: Mapping[str, str]) -> ModelSpec:
    """Return the entry with these commits where it names none."""

    def of(hub_id: str | None, revision: str | None) -> dict[str, str | None]:
        return {"revision": revision or commits.get(hub_id or "")}

    draft = spec.speculative
    parts = {
        "speculative": draft and draft.model_copy(update=of(draft.hub_id, draft.revision)),
        "adapters": tuple(part.model_copy(update=of(part.hub_id, part.revision)) for part in spec.adapters),
    }
    return spec.model_copy(update=of(spec.hub_id, spec.revision) | parts)


def unsettled(spec: ModelSpec) -> list[str]:
    """Return the hub ids of the entry's repositories that name no commit."""
    return list(dict.fromkeys(hub_id for hub_id, revision in spec.repositories if not revision))


def settle(
    spec: ModelSpec,
    resolve: Resolve,
    say: Callable[[str, str], None] = lambda _hub_id, _commit: None,
    *,
    lock: Lock | None = None,
    update: bool = False,
) -> ModelSpec:
    """Return the entry with a commit for each of its repositories, as the cache's record or else the hub has it.

    Args:
        spec: The entry, with what the lock file settles.
        resolve: Asks the hub for a repository's newest commit.
        say: Called with hub id and commit of each repository that was settled.
        lock: Keeps others that share the cache from settling at the same time.
        update: Ask the hub although the record knows. A record that others share is left alone: they serve what it
            says until the next deploy.

    Raises:
        WeightsError: The hub does not tell, and the cache has no commit of that repository either.
    """
    names, file = unsettled(spec), cache_record()
    if not names:
        return spec
    known = {} if update else read(file)
    if set(names) - known.keys():
        with lock.held("revisions", lambda _: None) if lock else nullcontext():
            known = {} if update else read(file)
            known |= {name: _newest(name, resolve) for name in names if name not in known}
            if not (update and lock):
                with suppress(OSError):  # a cache that cannot be written has no other user either
                    known |= record(file, known, update=update)
    for name in names:
        say(name, known[name])
    return pinned(spec, known)


def noting(file: Path | None, say: Callable[[str], None]) -> Callable[[str, str], None]:
    """Return what records a settled commit in a lock file too, where it can be written, and says where it stands."""

    def note(hub_id: str, commit: str) -> None:
        where = cache_record()
        with suppress(OSError):
            if file:
                record(file, {hub_id: commit}, update=True)
                where = file
        say(f"{hub_id} is at {commit}, recorded in {where}")

    return note


def asking(token: str | None) -> Resolve:
    """Return what asks the hub with this token; a hub out of reach is found out once, and soon."""
    reached: list[bool] = []

    def resolve(hub_id: str) -> str:
        if not reached:
            reached.append(huggingface.in_reach())
        if not reached[0]:
            raise WeightsError(
                f"{hub_id} is at no known commit: its entry names none, none is recorded in {cache_record()}, and "
                f"{endpoint()} is not in reach. Check the connection, or write the revision into the entry."
            )
        return huggingface.resolve(hub_id, token)

    return resolve


def _newest(hub_id: str, resolve: Resolve) -> str:
    """Ask the hub; what does not answer is made up for by what the hub's client noted at its last visit."""
    try:
        return resolve(hub_id)
    except ServiceError:
        if noted := manifest.newest_known(hub_id):
            return noted
        raise


def read(file: Path) -> dict[str, str]:
    """Return hub id -> commit of a lock file or record; nothing where there is none.

    Raises:
        RegistryError: It is no TOML, or holds something else than commits.
    """
    try:
        table = tomllib.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RegistryError(f"Lock file '{file}' cannot be read: {error}. Correct it, or remove it.") from error
    revisions = table.get("revisions")
    if not isinstance(revisions, dict):
        raise RegistryError(f"Lock file '{file}' has no [revisions] table. Correct it, or remove it.")
    for hub_id, commit in revisions.items():
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise RegistryError(f"Lock file '{file}': {hub_id!r} is {commit!r}, not a commit of 40 hexadecimal digits.")
    return revisions


def record(file: Path, commits: Mapping[str, str], *, update: bool = False) -> dict[str, str]:
    """Add commits to a lock file, and return what it holds then: what is there already stays, unless to be updated.

    Raises:
        OSError: It cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(file.parent):
        before = read(file)
        held = before | dict(commits) if update else dict(commits) | before
        if held != before:
            part = file.with_name(f".{file.name}.part")
            part.write_text(_HEAD + "".join(_lines(held)))
            part.replace(file)
    return held


def _lines(commits: Mapping[str, str]) -> Iterable[str]:
    return (f'"{hub_id}" = "{commits[hub_id]}"\n' for hub_id in sorted(commits))


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Let one process of this machine change files here at a time, where the file system has locks."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
