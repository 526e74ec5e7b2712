"""Resolves the revision of entries that pin none: once, recorded, and the same for every replica from then on.

In this order: the entry's own `revision`; the lock file beside the registry, which a deploy carries into every replica;
the record in the cache (on Modal the volume, which all replicas share); and only then the hub.
"""

from __future__ import annotations

import logging
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from service.errors import HubUnreachableError, RegistryError, ServiceError
from service.files import atomic_write, expand_user
from service.registry.models import BUILT_IN, ModelSpec, Registry
from service.weights import hub_cache
from service.weights.files import is_upload, label
from service.weights.hub import hub_for

if TYPE_CHECKING:
    from service.weights.locks import Lock
    from service.weights.reach import Unreachable

_log = logging.getLogger(__name__)
Resolve = Callable[[str], str]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HEAD = """\
# The commits of models whose entries name no revision, so that everybody who has this file serves the same.
# 'vllm-service models --pin' adds what is missing; 'vllm-service prefetch <model> --update' takes the newest instead.
[revisions]
"""


def lock_file(models_file: str | Path | None) -> Path:
    """Return the lock file beside the registry: `my-models.lock.toml` beside `my-models.toml`."""
    return (expand_user(models_file) if models_file else BUILT_IN).with_suffix(".lock.toml")


def cache_record() -> Path:
    """Return the lock file of the cache itself, which lies beside what huggingface_hub manages."""
    return hub_cache.hub_cache().parent / "vllm-service.revisions.toml"


def registry(models_file: str | Path | None) -> Registry:
    """Read the registry with the revisions of the lock files; makes no connection.

    Raises:
        RegistryError: The models file or a lock file is wrong.
    """
    files = dict.fromkeys((lock_file(None), lock_file(models_file)))
    commits = {hub_id: commit for file in files for hub_id, commit in read(file).items()}
    loaded = Registry.load(models_file)
    return loaded.replace({key: with_revisions(spec, commits) for key, spec in loaded.specs.items()})


def with_revisions(spec: ModelSpec, commits: Mapping[str, str]) -> ModelSpec:
    """Return the entry with these commits where it names none."""

    def of(hub_id: str | None, revision: str | None) -> dict[str, str | None]:
        return {"revision": revision or commits.get(hub_id or "")}

    draft = spec.speculative
    parts = {
        "speculative": draft and draft.model_copy(update=of(draft.hub_id, draft.revision)),
        "adapters": tuple(part.model_copy(update=of(part.repository, part.revision)) for part in spec.adapters),
    }
    return spec.model_copy(update=of(spec.repository, spec.revision) | parts)


def unpinned(spec: ModelSpec) -> list[str]:
    """Return the hub ids of the entry's repositories that name no commit."""
    return list(dict.fromkeys(hub_id for hub_id, revision in spec.repositories if not revision))


def resolve_revisions(
    spec: ModelSpec,
    resolve: Resolve,
    on_resolved: Callable[[str, str], None] = lambda _hub_id, _commit: None,
    *,
    lock: Lock | None = None,
    update: bool = False,
) -> ModelSpec:
    """Return the entry with a commit for each of its repositories, from the cache's record or else from the hub.

    Args:
        spec: The entry, with the revisions of the lock file.
        resolve: Returns a repository's newest commit, such as a `RevisionResolver`.
        on_resolved: Called with hub id and commit of each repository that the entry does not pin.
        lock: Serialises replicas that share the cache; None: there are none.
        update: Ask the hub even if a commit is recorded. With `lock` the record stays as it is: replicas serve the
            recorded commit until the next deploy.

    Raises:
        WeightsError: The hub cannot be reached, and the cache has no commit of that repository.
    """
    if uploads := {name: resolve(name) for name in unpinned(spec) if is_upload(name)}:
        spec = with_revisions(spec, uploads)  # not recorded: the newest is noted beside each upload
        for name, revision in uploads.items():
            on_resolved(name, revision)
    names, file = unpinned(spec), cache_record()
    if not names:
        return spec
    known = {} if update else read(file)
    if set(names) - known.keys():
        with lock.held("revisions") if lock else nullcontext():
            known = {} if update else read(file)
            known |= {name: _newest(name, resolve) for name in names if name not in known}
            if not (update and lock):
                with suppress(OSError):  # a cache that cannot be written has no other reader to share with
                    known |= record(file, known, update=update)
    for name in names:
        on_resolved(name, known[name])
    return with_revisions(spec, known)


def lock_writer(file: Path | None) -> Callable[[str, str], None]:
    """Return a function that records a commit as `record_commit` does, and logs it."""

    def write(hub_id: str, commit: str) -> None:
        _log.info("%s is at %s, recorded in %s", label(hub_id), commit, record_commit(file, hub_id, commit))

    return write


def record_commit(file: Path | None, hub_id: str, commit: str) -> Path:
    """Record a resolved commit in a lock file, where it can be written; return the file that has it."""
    with suppress(OSError):
        if file:
            record(file, {hub_id: commit}, update=True)
            return file
    return cache_record()


class RevisionResolver:
    """Asks the hub for newest commits. Whether a hub is reachable is found out once, within seconds."""

    def __init__(self) -> None:
        self._unreachable: dict[str, Unreachable | None] = {}

    def __call__(self, hub_id: str) -> str:
        """Return the newest commit of a repository.

        Raises:
            WeightsError: The hub cannot be reached, or has no such repository.
        """
        hub = hub_for(hub_id)
        if hub.url not in self._unreachable:
            self._unreachable[hub.url] = hub.why_unreachable()
        if unreachable := self._unreachable[hub.url]:
            raise HubUnreachableError(
                f"{hub_id} is at no known commit: its entry names none, none is recorded in {cache_record()}, and "
                f"{hub.url} is not in reach: {unreachable.reason}.",
                hint=f"{unreachable.hint} Or write the revision into the entry.",
            )
        return hub.resolve(hub_id)


def _newest(hub_id: str, resolve: Resolve) -> str:
    """Ask the hub; where that fails, use the commit that huggingface_hub noted at its last visit."""
    try:
        return resolve(hub_id)
    except ServiceError:
        if noted := hub_cache.newest_known(hub_id):
            return noted
        raise


def read(file: Path) -> dict[str, str]:
    """Return hub id -> commit of a lock file; empty where there is no file.

    Raises:
        RegistryError: It is not TOML, or holds something other than commits.
    """
    try:
        table = tomllib.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RegistryError(f"Lock file '{file}' cannot be read: {error}.", hint="Correct it, or remove it.") from error
    revisions = table.get("revisions")
    if not isinstance(revisions, dict):
        raise RegistryError(f"Lock file '{file}' has no [revisions] table.", hint="Correct it, or remove it.")
    for hub_id, commit in revisions.items():
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise RegistryError(
                f"Lock file '{file}': {hub_id!r} is {commit!r}, not a commit of 40 hexadecimal digits.",
                hint="Correct it, or remove it.",
            )
    return revisions


def record(file: Path, commits: Mapping[str, str], *, update: bool = False) -> dict[str, str]:
    """Add commits to a lock file, and return all that it then holds; `update` also replaces commits that are there.

    Raises:
        OSError: It cannot be written.
    """
    with _writing():
        before = read(file)
        held = before | dict(commits) if update else dict(commits) | before
        if held != before:
            atomic_write(file, (_HEAD + "".join(_lines(held))).encode())
    return held


def _lines(commits: Mapping[str, str]) -> Iterable[str]:
    return (f'"{hub_id}" = "{commits[hub_id]}"\n' for hub_id in sorted(commits))


@contextmanager
def _writing() -> Iterator[None]:
    """Let one process of this machine change a lock file at a time, where the cache can hold a file for it."""
    from filelock import FileLock  # noqa: PLC0415 - 23 ms; only an entry that names no commit needs it

    file = hub_cache.hub_cache() / ".locks" / "vllm-service.revisions.lock"
    lock = FileLock(file, fallback_to_soft=False)
    try:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        yield
    finally:
        lock.release()
