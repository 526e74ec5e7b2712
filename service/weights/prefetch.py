"""Stocking a cache with weights: what `vllm-service prefetch` does, on this machine and in a container alike.

The work is told as a stream of words, so that whoever asked, here or across Modal, shows one and the same progress.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from service.errors import ServiceError, UnknownModelError, UsageError
from service.registry.models import ModelSpec, Registry, unregistered
from service.weights import revisions, store
from service.weights.store import Progress

if TYPE_CHECKING:
    from service.weights.locks import Lock

DEFAULT_HUB_SECRET = "huggingface"  # noqa: S105 - the name of a secret, not its value
_SHOWN_EVERY_S = 0.2
_END_S = 10.0


class Order(BaseModel):
    """What is to be done; JSON, for it travels to a container.

    Attributes:
        specs: The models, with what the lock files settle.
        recorded_in: The lock file of those models; None where one of them is in no registry.
        verify: Check what is here instead of fetching.
        update: Take the newest commit where an entry names none, whatever is recorded.
        prune: Remove revisions that none of `keep` names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    specs: tuple[ModelSpec, ...] = ()
    recorded_in: str | None = None
    verify: bool = False
    update: bool = False
    prune: bool = False
    keep: tuple[ModelSpec, ...] = ()


@dataclass(frozen=True)
class Said:
    """A sentence for people."""

    text: str


@dataclass(frozen=True)
class Settled:
    """A repository whose commit an entry does not name is at this one."""

    hub_id: str
    commit: str


@dataclass(frozen=True)
class Done:
    """A model is complete, or was checked.

    Attributes:
        size: What it takes, in bytes.
        fetched: Something came from the hub just now.
        damage: Sentences about files that are damaged or missing.
    """

    key: str
    hub_id: str | None
    revision: str | None
    size: int = 0
    fetched: bool = False
    damage: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failed:
    """One of several models cannot be had; the others can."""

    key: str
    reason: str


@dataclass(frozen=True)
class Freed:
    """A revision was removed."""

    hub_id: str
    revision: str
    size: int


Word = Progress | Said | Settled | Done | Failed | Freed


def order(
    names: list[str],
    registry: Registry,
    models_file: str | None,
    everything: bool,
    on_modal: bool,
    *,
    verify: bool = False,
    prune: bool = False,
    update: bool = False,
) -> Order:
    """Return the order for these names, each model once.

    Args:
        names: Any names of the registry; on this machine hub ids that are in none too.
        registry: With what the lock files settle.
        models_file: Where it is from, beside the built-in one.
        everything: Every entry of the registry.
        on_modal: For the volume of the deployed service, which serves the registry's models only.
        verify: See `Order`, as for `prune` and `update`.
        prune: With no model named it is all that is done.
        update: What the lock files settle does not count.

    Raises:
        UsageError: Nothing is named, or a name is unknown.
    """
    if not (names or everything or prune):
        raise UsageError(f"Name the models to fetch, or say --all. Registered: {', '.join(registry.specs)}.")
    if names and everything:
        raise UsageError(f"--all means every model of the registry; leave it out, or leave out {', '.join(names)}.")
    source = Registry.load(models_file) if update else registry
    chosen = list(source.specs.values()) if everything else [_find(name, source, on_modal) for name in names]
    if on_modal and everything:  # what lies on this machine is no business of Modal's
        chosen = [spec for spec in chosen if not (spec.path and Path(spec.path).is_absolute())]
    specs = {spec.key: spec for spec in chosen}
    registered = set(registry.specs)
    return Order(
        specs=tuple(specs.values()),
        recorded_in=None if set(specs) - registered else str(revisions.lock_file(models_file)),
        verify=verify,
        update=update,
        prune=prune,
        keep=tuple({**registry.specs, **specs}.values()) if prune else (),
    )


def secret(wanted: Order, named: str | None) -> str | None:
    """Return the name of the secret with the hub's token, when a model needs one or the user has named one."""
    return named or (DEFAULT_HUB_SECRET if any(spec.gated for spec in wanted.specs) else None)


def _find(name: str, registry: Registry, only_registered: bool) -> ModelSpec:
    try:
        return registry.resolve(name).spec
    except UnknownModelError:
        if only_registered or name.count("/") != 1 or Path(name).exists():
            raise
        return unregistered(name)


def stock(wanted: Order, token: str | None = None, lock: Lock | None = None) -> Iterator[Word]:
    """Do it, and tell what happens. The work ends when the iterator is closed; what is finished is kept.

    Raises:
        ServiceError: The only model cannot be had; of several the others are got all the same.
    """
    words: SimpleQueue[Word | BaseException | None] = SimpleQueue()
    left = threading.Event()
    tell = _Teller(words.put, left)

    def work() -> None:
        try:
            _work(wanted, token, lock, tell)
        except BaseException as error:  # noqa: BLE001 - it is raised again, where the words are read
            words.put(error)
        else:
            words.put(None)

    worker = threading.Thread(target=work, name="stocking", daemon=True)
    worker.start()
    try:
        while (word := words.get()) is not None:
            if isinstance(word, BaseException):
                raise word
            yield word
    finally:
        left.set()  # the next progress ends the download
        worker.join(_END_S)


class _Teller:
    """Passes words on: of progress so many as an eye can follow, and none once nobody listens."""

    def __init__(self, put: Callable[[Word], None], left: threading.Event) -> None:
        self._put, self._left = put, left
        self._shown: tuple[str, str] | None = None
        self._at = 0.0

    def __call__(self, word: Word) -> None:
        if self._left.is_set():
            raise InterruptedError("Nobody waits for it any more.")
        if isinstance(word, Progress):
            now, what = time.monotonic(), (word.hub_id, word.phase)
            if what == self._shown and now - self._at < _SHOWN_EVERY_S and word.done_bytes < word.total_bytes:
                return
            self._shown, self._at = what, now
        self._put(word)


def _work(wanted: Order, token: str | None, lock: Lock | None, tell: _Teller) -> None:
    settled: dict[str, ModelSpec] = {}
    resolve = revisions.asking(token)
    for spec in wanted.specs:
        try:
            settled[spec.key] = ready = revisions.settle(
                spec,
                resolve,
                lambda hub_id, commit: tell(Settled(hub_id, commit)),
                lock=lock,
                update=wanted.update,
            )
            tell(_verified(ready, tell) if wanted.verify else _fetched(ready, token, lock, tell))
        except ServiceError as error:
            if len(wanted.specs) == 1:
                raise
            tell(Failed(spec.key, str(error)))
    if wanted.prune:
        known = revisions.read(revisions.cache_record())
        kept = [settled.get(spec.key) or revisions.pinned(spec, known) for spec in wanted.keep]
        for hub_id, revision, size in store.prune(kept):
            tell(Freed(hub_id, revision, size))


def _fetched(spec: ModelSpec, token: str | None, lock: Lock | None, tell: _Teller) -> Done:
    found = store.fetch(spec, token, tell, lock, lambda text: tell(Said(text)))
    places = [found.model, *([found.draft] if found.draft else []), *found.adapters.values()]
    return Done(spec.key, spec.hub_id, spec.revision, sum(map(_size, places)), found.fetched)


def _verified(spec: ModelSpec, tell: _Teller) -> Done:
    damage = store.verify(spec, on_progress=tell)
    return Done(spec.key, spec.hub_id, spec.revision, damage=tuple(damage))


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
