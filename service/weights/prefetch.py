"""Fills a cache with weights: what `vllm-service prefetch` does, on this machine and in a container alike.

What happens is reported as a stream of events, so that the command shows the same progress of a prefetch on this
machine and of one on Modal.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from service.errors import ServiceError, UnknownModelError, UsageError
from service.registry.models import ModelSpec, Registry, unregistered
from service.weights import revisions, store
from service.weights.progress import Progress

if TYPE_CHECKING:
    from service.weights.locks import Lock

_PROGRESS_EVERY_S = 0.2
_END_S = 10.0
_THREAD = "prefetch"


class PrefetchRequest(BaseModel):
    """What to do. Travels to a container as JSON.

    Attributes:
        specs: The models, with the revisions of the lock files.
        recorded_in: The lock file of those models; None where one of them is in no registry.
        verify: Check what is in the cache instead of fetching.
        update: Take the newest commit where an entry names none, even if another is recorded.
        prune: Remove revisions that none of `keep` names.
        keep: The models whose revisions are kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    specs: tuple[ModelSpec, ...] = ()
    recorded_in: str | None = None
    verify: bool = False
    update: bool = False
    prune: bool = False
    keep: tuple[ModelSpec, ...] = ()


@dataclass(frozen=True)
class Message:
    """A sentence for people."""

    text: str


@dataclass(frozen=True)
class RevisionResolved:
    """The commit of a repository whose entry names none."""

    hub_id: str
    commit: str


@dataclass(frozen=True)
class ModelReady:
    """A model is complete, or was checked.

    Attributes:
        size: Of all its files, in bytes.
        fetched: Something was downloaded or verified just now.
        damage: Sentences about files that are damaged or missing.
    """

    key: str
    hub_id: str | None
    revision: str | None
    size: int = 0
    fetched: bool = False
    damage: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelFailed:
    """One of several models could not be fetched; the others go on."""

    key: str
    reason: str


@dataclass(frozen=True)
class RevisionRemoved:
    """A revision was removed."""

    hub_id: str
    revision: str
    size: int


PrefetchEvent = Progress | Message | RevisionResolved | ModelReady | ModelFailed | RevisionRemoved


def build_request(
    names: list[str],
    registry: Registry,
    models_file: str | None,
    *,
    everything: bool = False,
    on_modal: bool = False,
    verify: bool = False,
    prune: bool = False,
    update: bool = False,
) -> PrefetchRequest:
    """Return the request for these names, each model once.

    Args:
        names: Any names of the registry; on this machine also hub ids that are in no registry.
        registry: With the revisions of the lock files.
        models_file: The user's models file, beside the built-in one.
        everything: Every entry of the registry.
        on_modal: For the volume of the deployed service, which serves only the registry's models.
        verify: See `PrefetchRequest`.
        prune: See `PrefetchRequest`; without a name nothing else is done.
        update: See `PrefetchRequest`; the revisions of the lock files are ignored.

    Raises:
        UsageError: No name is given, or a name is unknown.
    """
    if not (names or everything or prune):
        raise UsageError(
            f"No model is named. Registered: {', '.join(registry.specs)}.",
            hint=f"Name one or more, as in 'vllm-service prefetch {next(iter(registry.specs))}', or pass --all.",
        )
    if names and everything:
        raise UsageError(
            "--all means every model of the registry.", hint=f"Leave it out, or leave out {', '.join(names)}."
        )
    source = Registry.load(models_file) if update else registry
    chosen = list(source.specs.values()) if everything else [_find(name, source, on_modal) for name in names]
    if everything:  # a directory of this machine is not on Modal, an upload is not on this machine
        chosen = [spec for spec in chosen if not (_is_directory(spec) if on_modal else spec.volume)]
    specs = {spec.key: spec for spec in chosen}
    are_entries = all(source.specs.get(key) == spec for key, spec in specs.items())
    return PrefetchRequest(
        specs=tuple(specs.values()),
        recorded_in=str(revisions.lock_file(models_file)) if are_entries else None,
        verify=verify,
        update=update,
        prune=prune,
        keep=tuple({**registry.specs, **specs}.values()) if prune else (),
    )


def _is_directory(spec: ModelSpec) -> bool:
    return spec.path is not None and Path(spec.path).is_absolute()


def _find(name: str, registry: Registry, only_registered: bool) -> ModelSpec:
    try:
        return registry.resolve(name).spec
    except UnknownModelError:
        if only_registered or name.count("/") != 1 or Path(name).exists():
            raise
        return unregistered(name)


def prefetch(request: PrefetchRequest, lock: Lock | None = None) -> Generator[PrefetchEvent]:
    """Do what is requested, and yield what happens. Closing the generator ends the work; finished files are kept.

    Log records of this package become `Message` events, since events may have to travel from a container on Modal.

    Raises:
        ServiceError: The only model cannot be fetched; of several, the others are fetched all the same.
    """
    events: SimpleQueue[PrefetchEvent | BaseException | None] = SimpleQueue()
    closed = threading.Event()
    emit = _Emitter(events.put, closed)

    def work() -> None:
        try:
            _work(request, lock, emit)
        except BaseException as error:  # noqa: BLE001 - it is raised again, where the events are read
            events.put(error)
        else:
            events.put(None)

    worker = threading.Thread(target=work, name=_THREAD, daemon=True)
    with _messages(lambda text: events.put(Message(text))):
        worker.start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            closed.set()  # the next progress ends the download
            worker.join(_END_S)


@contextmanager
def _messages(put: Callable[[str], None]) -> Iterator[None]:
    """Hand the log records of this package to `put` while the block lasts, and to no other handler."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            put(record.getMessage())

    log, handler = logging.getLogger("service.weights"), Handler()
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


class _Emitter:
    """Passes events on: progress a few times a second, and raises once the reader has closed its end."""

    def __init__(self, put: Callable[[PrefetchEvent], None], closed: threading.Event) -> None:
        self._put, self._closed = put, closed
        self._shown: tuple[str, str] | None = None
        self._at = 0.0

    def __call__(self, event: PrefetchEvent) -> None:
        if self._closed.is_set():
            raise InterruptedError("The reader of the events has closed its end.")
        if isinstance(event, Progress):
            now, shown = time.monotonic(), (event.hub_id, event.phase)
            if shown == self._shown and now - self._at < _PROGRESS_EVERY_S and event.done_bytes < event.total_bytes:
                return
            self._shown, self._at = shown, now
        self._put(event)


def _work(request: PrefetchRequest, lock: Lock | None, emit: _Emitter) -> None:
    resolved: dict[str, ModelSpec] = {}
    resolve = revisions.RevisionResolver()
    for spec in request.specs:
        try:
            resolved[spec.key] = ready = revisions.resolve_revisions(
                spec,
                resolve,
                lambda hub_id, commit: emit(RevisionResolved(hub_id, commit)),
                lock=lock,
                update=request.update,
            )
            emit(_verified(ready, emit) if request.verify else _fetched(ready, lock, emit))
        except ServiceError as error:
            if len(request.specs) == 1:
                raise
            emit(ModelFailed(spec.key, str(error)))
    if request.prune:
        recorded = revisions.read(revisions.cache_record())
        kept = [resolved.get(spec.key) or revisions.with_revisions(spec, recorded) for spec in request.keep]
        for hub_id, revision, size in store.prune(kept):
            emit(RevisionRemoved(hub_id, revision, size))


def _fetched(spec: ModelSpec, lock: Lock | None, emit: _Emitter) -> ModelReady:
    found = store.fetch(spec, emit, lock)
    directories = [found.model, *([found.draft] if found.draft else []), *found.adapters.values()]
    return ModelReady(spec.key, spec.repository, spec.revision, sum(map(_size, directories)), found.fetched)


def _verified(spec: ModelSpec, emit: _Emitter) -> ModelReady:
    damage = store.verify(spec, on_progress=emit)
    return ModelReady(spec.key, spec.repository, spec.revision, damage=tuple(damage))


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
